"""A plan on a terminal: bytes by kind and moment, what else there is, and the cards that it fits."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from layersample.planning.cards import HEADROOM, smallest_card
from layersample.planning.live_memory import KINDS, Kind
from layersample.planning.planner import Plan, PlannedSet


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan."""
    config = plan.config
    shard = "fsdp2" if plan.offload else config.shard
    how = "all of the model" if shard is None else f"a part of the model ({shard})"
    shared = f"; each of {plan.gpus} GPUs holds {how}" if plan.gpus > 1 else ""
    shared += "; weights are streamed from the host's memory" if plan.offload else ""
    console.print(
        f"{plan.model}: {plan.parameters:,} parameters; {config.batch_size} × {config.max_length} tokens in "
        f"{config.precision}{shared}",
        highlight=False,
    )
    if config.budget is not None:
        console.print(
            f"A budget of {config.budget} allows {config.num_active} layers at a time (γ).", highlight=False
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
    if plan.advice is not None:
        console.print(
            f"What would help most: {plan.advice.change.flags} gives {gib(plan.advice.peak_bytes)} GiB "
            f"({plan.advice.change.reason}).",
            highlight=False,
        )
    if host := plan.worst.memory.host_bytes:
        console.print(
            f"In the host's memory: up to {gib(host)} GiB of {_in_host(plan)}. A CPU holds them beside the peak.",
            highlight=False,
        )
    for note in plan.notes:
        console.print(f"Note: {note}", highlight=False)


def _in_host(plan: Plan) -> str:
    if plan.offload:
        return "weights, gradients and optimizer state"
    config = plan.config
    parts = {
        "exact weights": config.frozen_weights is not None,
        "masters' 16 bits beyond bf16": config.has_masters,
        "optimizer state": config.state == "offload",
    }
    return f"frozen layers ({', '.join(part for part, there in parts.items() if there)})"


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
    if not plan.baselines:
        return
    table = Table(
        "on this run's terms", "peak GiB", "smallest card", "as commonly run", box=None, header_style="bold"
    )
    run = plan.worst.memory.peak_bytes
    table.add_row("this run, worst set", gib(run), smallest_card(run) or "none", "")
    for name, row in plan.baselines.items():
        peak = row.memory.peak_bytes
        common = "the same" if row.as_common is None else gib(row.as_common.peak_bytes)
        table.add_row(name, gib(peak), smallest_card(peak) or "none", common)
    console.print()
    console.print(table)
    if any(row.as_common is not None for row in plan.baselines.values()):
        console.print(
            "As commonly run: without masters, chunked loss, recomputation and steps in the backward pass.",
            highlight=False,
        )
