"""What fits a card: models of half a billion to eight billion parameters, with the presets and the usual ways.

``python -m layersample_benchmarks.plan_cards``
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layersample.cli.plan_report import gib
from layersample.config import make_config, read_preset
from layersample.planning.cards import HEADROOM
from layersample.planning.planner import plan

from .store import RESULTS, store

MODELS = ("qwen2.5-0.5b", "tinyllama-1.1b", "qwen2.5-3b", "llama-2-7b", "llama-3.1-8b")
USUAL = ("full fine-tuning", "LoRA, rank 16")
PRESETS = ("lisa-7b", "owlore-16gb", "smallest")


def measure(models: tuple[str, ...] = MODELS) -> list[dict[str, Any]]:
    """Plan every preset for every model, and beside the first one the usual ways."""
    rows = []
    for model in models:
        peaks: dict[str, int] = {}
        for preset in PRESETS:
            planned = plan(model, make_config((preset, read_preset(preset))), baselines=preset == PRESETS[0])
            rows_beside = {name: planned.baselines[name] for name in USUAL if name in planned.baselines}
            peaks |= {name: (row.as_common or row.memory).peak_bytes for name, row in rows_beside.items()}
            peaks[preset] = planned.peak_bytes
        rows.append({"model": model, "parameters": planned.parameters, "peak_bytes": peaks})
    return rows


def main(output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS) -> None:
    """Plan every row, print the table, and store it."""
    rows = measure()
    ways = list(rows[0]["peak_bytes"])
    store(
        output,
        "plan_cards",
        {"rows": rows},
        title="What fits a card",
        about="Planned peaks in GiB, for the worst set of layers; bf16, one example of 1024 tokens, gradient "
        "checkpointing, moments in bf16. Full fine-tuning and LoRA as commonly run: every logit, no step in "
        f"backward. A card needs {HEADROOM / 2**30:.0f} GiB more, for the driver and fragmentation.",
        command="plan_cards",
        headings=("model", "parameters", *(f"--preset {way}" if way in PRESETS else way for way in ways)),
        rows=[
            [row["model"], f"{row['parameters'] / 1e9:.2f} B", *(gib(row["peak_bytes"][way]) for way in ways)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
