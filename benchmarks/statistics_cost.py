"""What it costs to collect statistics for samplers: a step with gradient norms, against one without.

``python -m layersample_benchmarks.statistics_cost``. CPU seconds of the process, the two in turns on the same batches.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer

from layersample import LayerSampler, LayerScheduler, SamplingContext
from layersample.config import BUILTIN_MODEL
from layersample.training.models import load_model

from .store import RESULTS, store
from .timed import TimedRun, ratios, real_batches

LAYERS = (9, 20)


class Fixed(LayerSampler):
    """The same layers in every period; with or without what training tells of them."""

    def __init__(self, layers: tuple[int, ...], *, collects: bool) -> None:
        self.layers = layers
        self.collects = frozenset({"gradients"} if collects else ())

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        """Return them."""
        return self.layers


def make_run(folder: str, layers: tuple[int, ...], *, collects: bool) -> TimedRun:
    """Load the model and build what trains two of its layers."""
    model, _ = load_model(folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    sampler = Fixed(layers, collects=collects)
    scheduler = LayerScheduler(model, optimizer, sampler, embeddings="freeze", period=5)
    return TimedRun(model, optimizer, scheduler)


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder of the model.")] = BUILTIN_MODEL,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each, of which the first isn't counted.")] = 61,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    layers: Annotated[str, typer.Option(help="The layers that train, by number.")] = "9,20",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print and store."""
    torch.set_num_threads(threads)
    chosen = tuple(int(number) for number in layers.split(","))
    runs = [make_run(model, chosen, collects=collects) for collects in (False, True)]
    batches = real_batches(model)
    for step in range(steps):
        for run in runs if step % 2 else reversed(runs):
            run.step(batches[step % len(batches)])
    without, collected = (run.cpu_seconds[1:] for run in runs)
    more = statistics.median(ratios(collected, without)) - 1
    figures = {"without": without, "collected": collected, "more": more, "layers": chosen, "model": model}
    store(
        output,
        "statistics_cost",
        figures,
        title="What statistics cost",
        about=f"Layers {layers} of {model} train in fp32, embedding and head frozen; batches of 4 x 128 tokens.",
        command="statistics_cost",
        headings=("step", "median CPU seconds"),
        rows=[
            ("without statistics", f"{statistics.median(without):.4f}"),
            ("with gradient norms", f"{statistics.median(collected):.4f}"),
        ],
        notes=[f"Median of the ratios, step by step: {100 * more:+.2f}%."],
    )


if __name__ == "__main__":
    typer.run(main)
