"""A plan on a terminal: bytes by kind and moment, what else there is, and the cards that it fits."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from layersample.planning.live_memory import KINDS, Kind
from layersample.planning.planner import CARDS, HEADROOM, Plan, PlannedSet, cards_that_fit
from layersample.planning.simulation import StepMemory


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan."""
    config = plan.config
    sharded = f", sharded over {plan.gpus} GPUs" if plan.gpus > 1 else ""
    console.print(
        f"{plan.model}: {plan.parameters:,} parameters; {config.batch_size} × {config.max_length} tokens in "
        f"{config.precision}{sharded}",
        highlight=False,
    )
    for name, planned in (("worst", plan.worst), ("typical", plan.typical)):
        _print_set(console, name, planned)
    _print_methods(console, plan)
    yes = ", ".join(name for name, fits in plan.fits.items() if fits) or "none"
    no = ", ".join(name for name, fits in plan.fits.items() if not fits) or "none"
    console.print(
        f"\nFits with {gib(HEADROOM)} GiB to spare (driver, fragmentation): {yes}. Does not fit: {no}.",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False)


def gib(size: float) -> str:
    """A size in GiB, with two decimals."""
    return f"{size / 2**30:.2f}"


def _print_set(console: Console, name: str, planned: PlannedSet) -> None:
    layers = f"{', '.join(planned.layers[:5])}{' …' if len(planned.layers) > 5 else ''}" or "no layer"
    console.print(
        f"\n[bold]{name} set[/]: {layers}; {planned.trainable:,} parameters train; peak "
        f"{gib(planned.memory.peak_bytes)} GiB in the {planned.memory.peak_moment}",
        highlight=False,
    )
    moments = planned.memory.moments
    kinds: list[Kind] = [kind for kind in KINDS if any(parts[kind] for parts in moments.values())]
    table = Table("GiB", *moments, box=None, header_style="bold")
    for kind in kinds:
        table.add_row(kind.replace("_", " "), *(gib(parts[kind]) for parts in moments.values()))
    table.add_row("in all", *(gib(sum(parts.values())) for parts in moments.values()))
    console.print(table)


def _print_methods(console: Console, plan: Plan) -> None:
    methods: dict[str, StepMemory] = {"this run, worst set": plan.worst.memory, **plan.baselines}
    if not plan.baselines:
        return
    table = Table("method", "peak GiB", *CARDS, box=None, header_style="bold")
    for name, memory in methods.items():
        fits = cards_that_fit(memory.peak_bytes).values()
        table.add_row(name, gib(memory.peak_bytes), *("fits" if fit else "-" for fit in fits))
    console.print()
    console.print(table)
