"""Plans beside what papers report, in their protocol: bf16, one example of 1024 tokens.

``python -m layersample_benchmarks.plan_papers``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from layersample.cli.plan_report import gib
from layersample.config import TrainConfig, make_config, read_preset
from layersample.planning.comparisons import common_options
from layersample.planning.planner import plan

from .store import RESULTS, store

_COMMON = {**common_options(), "precision": "bf16", "batch_size": 1, "max_length": 1024}
# What the papers report, and the same method planned as commonly run.
PAPERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("full fine-tuning", "llama-2-7b", "60 GB or more", {"sampler": "full"}),
    ("LISA, 2 layers", "llama-2-7b", "under 24 GB", {"sampler": "lisa"}),
    (
        "OwLore, 5 layers, rank 256",
        "llama-2-7b",
        "21 GB",
        {"sampler": "owlore", "num_active": 5, "projection": "galore", "rank": 256},
    ),
)
# Model, preset, and flags beside it.
PRESETS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama-2-7b", "lisa-7b", {}),
    ("llama-2-7b", "owlore-16gb", {}),
    ("llama-2-7b", "smallest", {}),
    ("llama-2-70b", "lisa-70b", {}),
    ("llama-2-7b", "lisa-8gb", {}),
    ("llama-2-7b", "lisa-8gb", {"master_weights": True}),
    ("llama-2-7b", "lisa-8gb", {"frozen_weights": "int8"}),
    ("llama-2-7b", "lisa-8gb", {"frozen_weights": "int8", "master_weights": True}),
    ("llama-2-7b", "lisa-12gb", {}),
    ("llama-2-7b", "lisa-12gb", {"master_weights": True}),
    ("llama-2-70b", "lisa-48gb", {}),
)


def measure(only: str = "", stored: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Plan every row.

    Args:
        only: What the name of a row must contain to be planned; the others are as they are stored.
        stored: Rows that were planned before.
    """
    configs = {
        (f"{name}, as commonly run", model): (reported, TrainConfig(**{**_COMMON, **options}))
        for name, model, reported, options in PAPERS
    }
    for model, preset, flags in PRESETS:
        name = " ".join([f"--preset {preset}", *(_flag(key, value) for key, value in flags.items())])
        configs[name, model] = "", make_config((preset, read_preset(preset)), ("flags", flags))
    before = {(row["run"], row["model"]): row for row in stored}
    return [
        _row(*key, *given) if only in key[0] or key not in before else before[key]
        for key, given in configs.items()
    ]


def _flag(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    return f"--{name}" if value is True else f"--{name} {value}"


def _row(name: str, model: str, reported: str, config: TrainConfig) -> dict[str, Any]:
    planned = plan(model, config, baselines=False)
    return {
        "run": name,
        "model": model,
        "reported": reported,
        "host_bytes": planned.worst.memory.host_bytes,
        "typical_bytes": planned.typical.memory.peak_bytes,
        "worst_bytes": planned.peak_bytes,
        "fits": next((card for card, fits in planned.fits.items() if fits), "none"),
    }


def main(
    only: Annotated[str, typer.Option(help="Plan rows with this in their name; keep the others.")] = "",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Plan every row, print the table, and store it."""
    before = output / "plan_papers.json"
    stored = json.loads(before.read_text(encoding="utf-8"))["rows"] if only and before.is_file() else []
    rows = measure(only, stored)
    store(
        output,
        "plan_papers",
        {"rows": rows},
        title="Plans beside the papers",
        about="bf16, one example of 1024 tokens, simulated without a GPU. As commonly run: bf16 moments, every "
        "logit, no checkpointing, state of frozen layers dropped.",
        command="plan_papers",
        headings=("run", "model", "reported", "typical GiB", "worst GiB", "host GiB", "smallest card"),
        rows=[_cells(row) for row in rows],
    )


def _cells(row: dict[str, Any]) -> list[str]:
    host = row.get("host_bytes", 0)
    sizes = [gib(row["typical_bytes"]), gib(row["worst_bytes"]), gib(host) if host else ""]
    return [row["run"], row["model"], row["reported"], *sizes, row["fits"]]


if __name__ == "__main__":
    typer.run(main)
