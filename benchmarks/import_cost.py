"""Seconds until layersample is there: imports and short commands, each in a new process, beside torch's own.

``python -m layersample_benchmarks.import_cost``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .store import RESULTS, store

_COMMANDS = {
    "import torch": ("-c", "import torch"),
    "import layersample": ("-c", "import layersample"),
    "LayerScheduler": ("-c", "from layersample import LayerScheduler"),
    "LayerSamplingCallback": ("-c", "from layersample import LayerSamplingCallback"),
    "layersample --version": ("-m", "layersample", "--version"),
    "layersample --help": ("-m", "layersample", "--help"),
    "layersample train --help": ("-m", "layersample", "train", "--help"),
    "layersample list": ("-m", "layersample", "list"),
}


def measure(rounds: int) -> list[dict[str, Any]]:
    """Run each command in turns, and take the median of its seconds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in _COMMANDS}
    for _ in range(rounds):
        for name, arguments in _COMMANDS.items():
            taken[name].append(_seconds(arguments))
    rows = []
    for name, pairs in taken.items():
        cpu, wall = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows.append({"what": name, "cpu_seconds": cpu, "wall_seconds": wall})
    return rows


def _seconds(arguments: tuple[str, ...]) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after, ended = os.times(), time.perf_counter()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return own, ended - started


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each command is run.")] = 9,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print the table, and store it."""
    rows = measure(rounds)
    torch = next(row["cpu_seconds"] for row in rows if row["what"] == "import torch")
    store(
        output,
        "import_cost",
        {"rows": rows, "rounds": rounds},
        title="What it takes to import layersample",
        about=f"Each in a new process, in turns; medians of {rounds}.",
        command="import_cost",
        headings=("what", "CPU s", "over torch", "wall s"),
        rows=[
            (
                row["what"],
                f"{row['cpu_seconds']:.2f}",
                f"{row['cpu_seconds'] - torch:+.2f}",
                f"{row['wall_seconds']:.2f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
