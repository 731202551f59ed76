"""What the machine does to a loss: the same runs on two machines, beside what a seed does to it.

``python -m layersample_benchmarks.two_machines FOLDER OTHER`` reads two folders of one suite, and compares the final
runs that both have: of the same row, seed, learning rate and steps. Losses of one machine may stand beside seconds of
another only where it does little.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from layersample.errors import ConfigError

from .side_by_side.results import read_results
from .side_by_side.stored_lines import Line, last_loss, machine_of
from .store import RESULTS, store

_Key = tuple[str, int, float, int]


def compare(folder: Path, other: Path) -> list[dict[str, Any]]:
    """The rows that both folders have runs of, with their losses in nats a token.

    Raises:
        ConfigError: If a folder holds no benchmark, or they have no run in common.
    """
    here, there = _finals(folder), _finals(other)
    both = sorted(here.keys() & there.keys())
    if not both:
        raise ConfigError(
            f"The folders must have final runs of the same row, seed, rate and steps, but {folder} and {other} have "
            "none."
        )
    rows = []
    for name in dict.fromkeys(key[0] for key in both):
        keys = [key for key in both if key[0] == name]
        losses = [(last_loss(here[key]), last_loss(there[key])) for key in keys]
        first = [loss for loss, _ in losses]
        rows.append(
            {
                "name": name,
                "seeds": len(keys),
                "losses": losses,
                "means": [fmean(column) for column in zip(*losses, strict=True)],
                "largest_difference": max((there - here for here, there in losses), key=abs),
                "spread": stdev(first) if len(first) > 1 else None,
                "peaks": [
                    fmean(lines[key]["peak_bytes"]["tensors"]["total"] for key in keys)
                    for lines in (here, there)
                    if all(lines[key]["peak_bytes"]["tensors"] for key in keys)
                ],
                "machines": [sorted({machine_of(lines[key]) for key in keys}) for lines in (here, there)],
            }
        )
    return rows


def _finals(folder: Path) -> dict[_Key, Line]:
    _, lines = read_results(folder)
    return {
        (line["method"], line["seed"], line["learning_rate"], len(line["training_loss"])): line
        for line in lines
        if line["stage"] == "final" and "error" not in line
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a benchmark.")],
    other: Annotated[Path, typer.Argument(help="One of the same suite, run on another machine.")],
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
) -> None:
    """Compare two machines, and store what came out."""
    rows = compare(folder, other)
    machines = [
        "; ".join(sorted({machine for row in rows for machine in row["machines"][side]})) for side in (0, 1)
    ]
    store(
        output,
        "two_machines",
        {"rows": rows},
        title="The same runs on two machines",
        about=f"Held-out losses in nats a token, of the runs in {folder.name} ({machines[0]}) and in {other.name} "
        f"({machines[1]}).",
        command=f"two_machines {folder.name} {other.name}",
        headings=(
            "row",
            "seeds",
            "loss",
            "loss there",
            "largest difference",
            "spread of seeds",
            "peak MiB",
            "there",
        ),
        rows=[
            [
                row["name"],
                str(row["seeds"]),
                *(f"{mean:.4f}" for mean in row["means"]),
                f"{row['largest_difference']:+.4f}",
                "–" if row["spread"] is None else f"{row['spread']:.4f}",
                *(
                    [f"{peak / 2**20:,.1f}" for peak in row["peaks"]]
                    if len(row["peaks"]) == 2
                    else ["–", "–"]
                ),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
