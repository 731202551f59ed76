"""All that is claimed of a GPU, measured in one go: memory beside its plan, times, bits, flat memory, a falling loss.

    python -m layersample_benchmarks.gpu_check --output benchmarks/results/gpu

It needs no network: models are built from shapes with random weights. ``--scale tiny --device cpu`` runs every line in
about a minute; a figure that has no meaning there isn't given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from layersample.errors import ConfigError

from .gpu import flat_memory, masters, memory, resume, step_times, switches, training
from .gpu.bench import Bench, Row
from .store import RESULTS, store

MEASUREMENTS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "memory": memory.measure,
    "step_times": step_times.measure,
    "switches": switches.measure,
    "masters": masters.measure,
    "resume": resume.measure,
    "flat_memory": flat_memory.measure,
    "training": training.measure,
}


class Scale(StrEnum):
    """Sizes of the models."""

    FULL = "full"
    TINY = "tiny"


def measure(bench: Bench, only: list[str] | None = None) -> list[Row]:
    """Run the measurements, all of them by default.

    Raises:
        ConfigError: If one of ``only`` isn't a measurement.
    """
    unknown = sorted(set(only or ()) - MEASUREMENTS.keys())
    if unknown:
        raise ConfigError(
            f"Measurements must be among {', '.join(MEASUREMENTS)}, but got {', '.join(unknown)}."
        )
    rows = []
    for name, function in MEASUREMENTS.items():
        if not only or name in only:
            for row in function(bench):
                print(f"{row.verdict:>13}  {row.measurement}: {row.setting}  {row.found}", flush=True)
                rows.append(row)
            bench.release()
    return rows


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "gpu",
    scale: Annotated[Scale, typer.Option(help="tiny: four small layers, to check every line.")] = Scale.FULL,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    only: Annotated[list[str] | None, typer.Option(help="A measurement; may be repeated.")] = None,
) -> None:
    """Measure, print the table, and store it with the machine."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"device must be cuda or cpu, but got {device}.")
    if device == "cuda" and not torch.cuda.is_available():
        typer.echo(
            "There is no CUDA device here. `--scale tiny --device cpu` checks every line of the script.",
            err=True,
        )
        raise typer.Exit(2)
    if device == "cpu" and scale is Scale.FULL:
        raise typer.BadParameter("on a CPU the scale must be tiny: its figures say nothing of a GPU.")
    rows = measure(Bench(torch.device(device), scale is Scale.TINY), only)
    misses = [row for row in rows if row.verdict == "MISS"]
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU, which says nothing of a GPU"
    store(
        output,
        "gpu_check" if device == "cuda" else "gpu_check_on_cpu",
        {"scale": scale.value, "device": device, "rows": [vars(row) for row in rows]},
        title="What is claimed of a GPU" if device == "cuda" else "The lines of gpu_check, on a CPU",
        about=f"Measured on {where}, scale {scale.value}. A figure beyond its bound is a MISS.",
        command=f"gpu_check --scale {scale.value} --device {device}",
        headings=("measurement", "setting", "found", "claimed", "verdict"),
        rows=[[row.measurement, row.setting, row.found, row.claimed, row.verdict] for row in rows],
        notes=(f"{len(misses)} of {len(rows)} lines miss their bound.",),
    )


if __name__ == "__main__":
    typer.run(main)
