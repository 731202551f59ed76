"""How a run looks on a terminal: its configuration, a live bar, and its summary."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from layersample.cli.consoles import plain
from layersample.config import TrainConfig
from layersample.options import Role, names_with


def make_bar(console: Console) -> Progress:
    """Bars with a status behind each, which is a field of the task; none where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )


class LiveProgress:
    """Bars for training and evaluation; where there is no terminal, a line every few steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._bar = make_bar(console)

    def begin(self, steps: int, done: int) -> None:
        """Show the bar of training."""
        self._show("training", done, steps)

    def evaluate(self, batch: int, batches: int) -> None:
        """Show how far an evaluation is; its bar goes with the last batch."""
        self._show("held-out loss", batch, batches)
        if batch == batches:
            self._bar.remove_task(self._tasks.pop("held-out loss"))

    def held_out(self, step: int, loss: float) -> None:
        """Say what an evaluation gave."""
        self._console.print(f"Held-out loss after step {step}: {loss:.4f}", highlight=False)

    def step(self, record: dict[str, Any]) -> None:
        """Move the bar by one step."""
        layers = " ".join(map(str, record["active"]))
        status = f"loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}  layers {layers}"
        steps = self._bar.tasks[self._bar.task_ids.index(self._tasks["training"])].total or 1
        self._show("training", record["step"], steps, status)
        if self._bar.disable and (record["step"] % max(1, steps // 20) == 0 or record["step"] == steps):
            self._console.print(f"step {record['step']}/{steps}  {status}", highlight=False)

    def end(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _show(self, name: str, done: int, total: float, status: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, status=status)
            self._bar.start()
        self._bar.update(self._tasks[name], completed=done, status=status)


def print_config(console: Console, config: TrainConfig) -> None:
    """Print every option that differs from its default, and the few that everyone asks for."""
    always = names_with(TrainConfig, Role.SHOWN)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, field in TrainConfig.model_fields.items():
        value = config.run_period if name == "period" else getattr(config, name)
        if config.epochs is not None and (name == "steps" or (name == "period" and config.period is None)):
            continue  # they take the place of steps, which aren't known yet, nor what follows from them
        if value != field.default or (name in always and value is not None):
            table.add_row(f"[dim]{name}[/]", plain(value))
    console.print(table)


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print what a run measured."""
    loss, peak = summary["held_out_loss"], summary["peak_bytes"]
    trainable, total = summary["trainable_parameters"], summary["parameters"]
    rows = [
        ("held-out loss", f"{loss['before']:.4f} → {loss['after']:.4f}"),
        (f"{summary['granularity']}s trained", f"{summary['layers_trained']} of {len(summary['layers'])}"),
        (
            "trainable parameters",
            f"{trainable['mean'] / 1e6:.1f}M at a time of {total / 1e6:.1f}M ({trainable['mean'] / total:.1%})",
        ),
        ("weights", _bytes(peak["weights"])),
        ("gradients, at most", _bytes(peak["gradients"])),
        ("optimizer state, at most", _bytes(peak["optimizer_state"])),
        ("process, at most", _bytes(peak["process"])),
        ("training", f"{summary['seconds']['training']:.0f} s"),
    ]
    for kind, title in (
        ("offloaded_state", "optimizer state, offloaded"),
        ("master_weights", "fp32 masters, at most"),
        ("master_remainders", "fp32 remainders, in CPU memory"),
        ("host_weights", "exact weights of frozen layers, in CPU memory"),
    ):
        if peak[kind]:
            rows.insert(-2, (title, _bytes(peak[kind])))
    if moving := summary.get("moving_parameters"):
        text = f"{moving['mean'] / 1e6:.1f}M at a time ({moving['mean'] / total:.1%})"
        rows.insert(3, ("moving without state", text))
    if saved := summary.get("held_out_loss_as_saved"):
        rows[0] = ("held-out loss, as trained", rows[0][1])
        rows.insert(1, ("held-out loss, as saved", f"{saved['before']:.4f} → {saved['after']:.4f}"))
    if peak["device"] is not None:
        rows.insert(-1, ("GPU, at most", _bytes(peak["device"])))
    if ranks := summary.get("ranks"):
        # What stands above is of the rank that held most.
        held = [
            sum(peak[kind] for kind in ("weights", "gradients", "optimizer_state"))
            for peak in ranks["peak_bytes"]
        ]
        shared = f"shards ({ranks['shard']})" if ranks["shard"] else "all of the model on each"
        least, most = _bytes(min(held)), _bytes(max(held))
        rows.insert(
            -1, (f"{len(held)} ranks, {shared}", f"{least} to {most} of weights, gradients and state")
        )
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[dim]{name}[/]", value)
    console.print(table)
    console.print(
        f"Written to {summary['output']}: " + ", ".join(summary["files"]), highlight=False, soft_wrap=True
    )


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
