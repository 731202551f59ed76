"""All that is claimed of a GPU, measured in one go: memory beside its plan, times, bits, flat memory, a falling loss.

    python -m layersample_benchmarks.gpu_check --output benchmarks/results/gpu

It needs no network: models are built from shapes with random weights. Nor does it need TRL or datasets; rows that need
PEFT or bitsandbytes say so where they are lacking. A command that was cut off goes on where it was. ``--scale tiny
--device cpu`` runs every line in about a minute; a figure that has no meaning there isn't given.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from layersample.environment import environment
from layersample.errors import ConfigError

from .gpu import flat_memory, masters, memory, resume, step_times, switches, training
from .gpu.bench import Bench, Job, Row
from .gpu.stored import StoredRows
from .store import RESULTS, store

MEASUREMENTS: Mapping[str, Callable[[Bench], dict[str, Job]]] = {
    "memory": memory.jobs,
    "step_times": step_times.jobs,
    "switches": switches.jobs,
    "masters": masters.jobs,
    "resume": resume.jobs,
    "flat_memory": flat_memory.jobs,
    "training": training.jobs,
}


class Scale(StrEnum):
    """Sizes of the models."""

    FULL = "full"
    TINY = "tiny"


def measure(bench: Bench, stored: StoredRows, only: list[str] | None = None) -> list[Row]:
    """Run the measurements that aren't stored yet, all of them by default, and give all rows that are.

    Args:
        bench: Where they run.
        stored: Rows of an earlier command, to which each job's are added.
        only: Names of measurements to run; the rows of others are given where they are stored.

    Raises:
        ConfigError: If one of ``only`` isn't a measurement.
    """
    unknown = sorted(set(only or ()) - MEASUREMENTS.keys())
    if unknown:
        raise ConfigError(
            f"Measurements must be among {', '.join(MEASUREMENTS)}, but got {', '.join(unknown)}."
        )
    found = []
    for name, jobs in MEASUREMENTS.items():
        for job, function in jobs(bench).items():
            key = f"{name}/{job}"
            rows = stored.rows(key)
            if rows is None and (not only or name in only):
                rows = _run(job, name, function)
                bench.release()
                stored.add(key, rows)
            found += rows or []
    return found


def _run(job: str, measurement: str, function: Job) -> list[Row]:
    """The rows of a job; that it failed, where an error ended it: the others can be had all the same."""
    rows = []
    try:
        for row in function():
            print(f"{row.verdict:>13}  {row.measurement}: {row.setting}  {row.found}", flush=True)
            rows.append(row)
    except Exception as error:  # of any kind: a GPU's libraries raise their own
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:200]
        failed = f"{type(error).__name__}: {first}"
        print(f"{'FAILED':>13}  {measurement}: {job}  {failed}", file=sys.stderr, flush=True)
        rows.append(Row(measurement, job, "", "", "FAILED", {"error": failed}))
    return rows


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS / "gpu",
    scale: Annotated[Scale, typer.Option(help="tiny: four small layers, to check every line.")] = Scale.FULL,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    only: Annotated[list[str] | None, typer.Option(help="A measurement; may be repeated.")] = None,
) -> None:
    """Measure, print the table, and store it with the machine.

    Each part is stored as soon as it is there. With the same --output, a command that was cut off goes on.
    """
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
    bench = Bench(torch.device(device), scale is Scale.TINY)
    name = "gpu_check" if device == "cuda" else "gpu_check_on_cpu"
    there = environment()
    machine = {key: there[key] for key in ("gpu", "processor", "versions")} | {"scale": scale.value}
    stored = StoredRows(output / f"{name}.rows.json", json.loads(json.dumps(machine)))
    rows = measure(bench, stored, only)
    _store(output, name, bench, scale, rows)
    if any(row.verdict == "FAILED" for row in rows):
        raise typer.Exit(1)
    if not only:
        stored.end()


def _store(output: Path, name: str, bench: Bench, scale: Scale, rows: list[Row]) -> None:
    device = bench.device.type
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("MISS", "FAILED")}
    where = torch.cuda.get_device_name() if bench.on_gpu else "a CPU, which says nothing of a GPU"
    notes = [f"{counts['MISS']} of {len(rows)} lines miss their bound."]
    if counts["FAILED"]:
        notes.append(f"{counts['FAILED']} parts ended with an error; the same command runs them again.")
    store(
        output,
        name,
        {"scale": scale.value, "device": device, "rows": [vars(row) for row in rows]},
        title="What is claimed of a GPU" if bench.on_gpu else "The lines of gpu_check, on a CPU",
        about=f"Measured on {where}, scale {scale.value}. A figure beyond its bound is a MISS.",
        command=f"gpu_check --scale {scale.value} --device {device}",
        headings=("measurement", "setting", "found", "claimed", "verdict"),
        rows=[
            [
                row.measurement,
                row.setting,
                row.found or row.figures.get("needs", ""),
                row.claimed,
                row.verdict,
            ]
            for row in rows
        ],
        notes=notes,
    )


if __name__ == "__main__":
    typer.run(main)
