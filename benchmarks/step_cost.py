"""What a step costs: time over the floor of arithmetic, optimizer state over 20 switches, the scheduler's own share.

Interleaved in one process against full fine-tuning and against LISA as published (state kept, embedding trained):
``python -m layersample_benchmarks.step_cost``. Peak memory is taken from one process a method.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, PreTrainedModel

from layersample import LayerSampler, LayerScheduler, SamplingContext, measure_memory
from layersample.training.models import load_model
from layersample.training.recording import peak_process_bytes

from .floors import flop_floor
from .store import RESULTS, store
from .timed import ratios, real_batches

BATCH, LENGTH = 4, 128


class Fixed(LayerSampler):
    """The same layers in every period."""

    def __init__(self, *, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        """Return them."""
        return self.layers


@dataclass(frozen=True)
class Method:
    """A row of the table: the scheduler's arguments, none for full fine-tuning."""

    arguments: dict[str, Any] | None
    layers: tuple[int, ...] | None = None


METHODS = {
    "full fine-tuning": Method(None),
    "LISA as published": Method({"sampler": "lisa", "state": "keep", "period": 1}),
    "layersample, lisa": Method({"sampler": "lisa", "state": "drop", "period": 1}),
    **{
        f"layersample, layers {a} and {b}": Method({"embeddings": "freeze", "period": 1}, (a, b))
        for a, b in ((0, 15), (9, 20), (28, 29))
    },
}


@dataclass
class Contestant:
    """A method with a model of its own, and what was measured of it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: LayerScheduler | None
    cpu_seconds: list[float] = field(default_factory=list)
    scheduler_seconds: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)

    @classmethod
    def make(cls, method: Method, folder: str) -> Contestant:
        """Load the model and build what trains it."""
        model, _ = load_model(folder)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        if method.arguments is None:
            return cls(model, optimizer, None)
        arguments = dict(method.arguments)
        sampler = arguments.pop("sampler", None) or Fixed(layers=method.layers or ())
        return cls(model, optimizer, LayerScheduler(model, optimizer, sampler, **arguments))

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step, timed in CPU seconds of all threads."""
        started = time.process_time()
        self.model(**batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.state_bytes.append(measure_memory(self.model, self.optimizer).optimizer_state)
        self.floors.append(self._floor())
        before = time.process_time()
        if self.scheduler is not None:
            self.scheduler.step()
        self.scheduler_seconds.append(time.process_time() - before)
        self.optimizer.zero_grad()
        self.cpu_seconds.append(time.process_time() - started)

    def _floor(self) -> float:
        if self.scheduler is None:
            return 1.0
        embedding: bool = self.model.get_input_embeddings().weight.requires_grad  # type: ignore[assignment]
        assert isinstance(self.model.config, LlamaConfig)
        layers = self.scheduler.active
        return float(flop_floor(self.model.config, BATCH, LENGTH, layers, embedding=embedding))


def measure(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Run all methods in turns, and compare each round's steps with the full step of the same round."""
    batches = real_batches(folder)
    contestants = {name: Contestant.make(method, folder) for name, method in METHODS.items()}
    for round in range(rounds + 1):  # the first one warms up
        for contestant in contestants.values():
            contestant.step(batches[round % len(batches)])
    full = contestants["full fine-tuning"]
    rows = []
    for name, c in contestants.items():
        over_full = ratios(c.cpu_seconds[1:], full.cpu_seconds[1:])
        over_floor = ratios(over_full, c.floors[1:])
        rows.append(
            {
                "method": name,
                "cpu_seconds": statistics.median(c.cpu_seconds[1:]),
                "step_over_full": statistics.median(over_full),
                "floor_over_full": statistics.median(c.floors[1:]),
                "step_over_floor": statistics.median(over_floor),
                "scheduler_share": sum(c.scheduler_seconds[1:]) / sum(c.cpu_seconds[1:]),
                "state_bytes_first": c.state_bytes[0],
                "state_bytes_last": c.state_bytes[-1],
                "state_bytes_max": max(c.state_bytes),
                "switches": rounds if c.scheduler else 0,
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each method, one switch each.")] = 20,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    peak_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the cost of a step, print the table, and store it."""
    if peak_of is not None:  # in a process of its own
        batches = real_batches(model)
        contestant = Contestant.make(METHODS[peak_of], model)
        for batch in batches[:4]:
            contestant.step(batch)
        typer.echo(json.dumps(peak_process_bytes()))
        return
    rows = measure(model, rounds)
    for row in rows:
        command = [
            sys.executable,
            "-m",
            "layersample_benchmarks.step_cost",
            "--model",
            model,
            "--peak-of",
            row["method"],
        ]
        row["peak_process_bytes"] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    store(
        output,
        "step_cost",
        {"batch": BATCH, "length": LENGTH, "rounds": rounds, "rows": rows},
        title="What a step costs",
        about=f"SmolLM2-135M, fp32, {BATCH} × {LENGTH} tokens of real text, a switch after every step, {rounds} "
        "rounds, medians of ratios within a round, CPU seconds of all threads; "
        "rows of fixed layers freeze the embedding.",
        command=f"step_cost --rounds {rounds}",
        headings=_HEADINGS,
        rows=[_cells(row) for row in rows],
    )


_HEADINGS = (
    "method",
    "step / full",
    "floor / full",
    "step / floor",
    "scheduler",
    "state after 1 step",
    "state, at most",
    "process, at most",
)


def _cells(row: dict[str, Any]) -> list[str]:
    mib = [
        f"{row[key] / 2**20:,.0f} MiB"
        for key in ("state_bytes_first", "state_bytes_max", "peak_process_bytes")
    ]
    ratios = [f"{row[key]:.3f}" for key in ("step_over_full", "floor_over_full", "step_over_floor")]
    return [row["method"], *ratios, f"{row['scheduler_share']:.2%}", *mib]


if __name__ == "__main__":
    typer.run(main)
