"""What frozen weights in 8 or 4 bits save and cost: bytes on the device, a step, and a switch of two layers.

``python -m layersample_benchmarks.frozen_cost``. Each format in turns with exact weights, on the same batches in one
process. Bytes are those of the storages that are alive between two steps, as ``LiveMemory`` finds them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from layersample import LayerSampler, LayerScheduler, SamplingContext, find_layers
from layersample.config import BUILTIN_MODEL
from layersample.environment import bf16_slowdown
from layersample.optim.memory_use import count_bytes, optimizer_tensors
from layersample.planning.live_memory import LiveMemory
from layersample.training.models import load_model

from .store import RESULTS, store
from .timed import ratios, real_batches

FORMATS = (None, "int8", "nf4")
PERIOD = 20  # of a real run, over which a switch is spread


class Alternating(LayerSampler):
    """Two layers, and in the next period their neighbours below."""

    def __init__(self, *, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        """Return them."""
        return tuple(layer - context.round % 2 for layer in self.layers)


@dataclass
class Contestant:
    """A model whose frozen weights are held in one format, and what was measured of it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: LayerScheduler
    step_seconds: list[float] = field(default_factory=list)
    switch_seconds: list[float] = field(default_factory=list)

    @classmethod
    def make(cls, folder: str, form: str | None, layers: tuple[int, ...], dtype: torch.dtype) -> Contestant:
        """Load the model and build what trains two layers of it, with both ends frozen."""
        model, _ = load_model(folder, dtype)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        scheduler = LayerScheduler(
            model,
            optimizer,
            Alternating(layers=layers),
            num_active=len(layers),
            period=2,
            embeddings="freeze",
            head="freeze",
            norm="freeze",
            frozen_weights=form,
        )
        return cls(model, optimizer, scheduler)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step, and every second time a switch, which is timed apart: CPU seconds of all threads."""
        started = time.process_time()
        self.model(**batch, use_cache=False).loss.backward()
        self.optimizer.step()
        stepped = time.process_time()
        round = self.scheduler.round
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step_seconds.append(stepped - started)
        if self.scheduler.round != round:
            self.switch_seconds.append(time.process_time() - stepped)

    def measure_bytes(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Bytes between two steps.

        Returns:
            ``layers``: weights of the layers; ``ends``: all other weights; ``left_over``: whatever else is alive
            behind a step, but for optimizer state and masters.
        """
        in_layers = {name for layer in find_layers(self.model).layers for name in layer.parameters}
        named = list(self.model.named_parameters())
        ends = count_bytes([*(p for name, p in named if name not in in_layers), *self.model.buffers()])
        frozen = self.scheduler.frozen
        live = LiveMemory(vocabulary=None)
        live.label([*self.model.parameters(), *self.model.buffers()], "weights")
        live.label(optimizer_tensors(self.optimizer), "optimizer_state")
        if frozen is not None:
            live.label(frozen.tensors, "weights")
            live.leave_out(frozen.exact_tensors)
        live.leave_out(batch.values())
        with live:
            self.model(**batch, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            live.label(optimizer_tensors(self.optimizer), "optimizer_state")
            with live.moment("behind"):
                pass
        behind = live.moments["behind"]
        left_over = sum(size for kind, size in behind.items() if kind not in ("weights", "optimizer_state"))
        return {"layers": behind["weights"] - ends, "ends": ends, "left_over": left_over}


def measure(
    folder: str, layers: tuple[int, ...], rounds: int, batch: int, length: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Run all formats in turns, and compare each round with the exact one of the same round."""
    batches = real_batches(folder, batch, length)
    contestants = {form: Contestant.make(folder, form, layers, dtype) for form in FORMATS}
    for round in range(2 * rounds + 2):  # the first two warm up
        ordered = list(contestants.values())
        for contestant in ordered if round % 2 else reversed(ordered):
            contestant.step(batches[round % len(batches)])
    exact = contestants[None]
    bytes_of = {form: c.measure_bytes(batches[0]) for form, c in contestants.items()}
    rows = []
    for form, c in contestants.items():
        held, whole = bytes_of[form], bytes_of[None]
        over_exact = ratios(c.step_seconds[2:], exact.step_seconds[2:])
        step, switch = statistics.median(c.step_seconds[2:]), statistics.median(c.switch_seconds[1:])
        rows.append(
            {
                "format": form or "exact",
                **{f"{key}_bytes": value for key, value in held.items()},
                "layers_over_exact": held["layers"] / whole["layers"],
                "all_over_exact": (held["layers"] + held["ends"]) / (whole["layers"] + whole["ends"]),
                "step_cpu_seconds": step,
                "step_over_exact": statistics.median(over_exact),
                "switch_cpu_seconds": switch,
                "switch_over_step": switch / step,
                "switch_share_at_period": switch / step / PERIOD,
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder of the model.")] = BUILTIN_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Switches of each; two steps of each a switch.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of an example.")] = 256,
    layers: Annotated[
        str, typer.Option(help="The layers that train, by number; in turns with those below.")
    ] = "9,20",
    fp32: Annotated[bool, typer.Option(help="Weights in fp32, on a processor that is slow in bf16.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print and store."""
    torch.set_num_threads(threads)
    chosen = tuple(int(number) for number in layers.split(","))
    rows = measure(model, chosen, rounds, batch, length, torch.float32 if fp32 else torch.bfloat16)
    kind = "fp32" if fp32 else "bf16"
    store(
        output,
        "frozen_cost",
        {"model": model, "batch": batch, "length": length, "type": kind, "period": PERIOD, "rows": rows},
        title="What frozen weights save and cost",
        about=f"{model} in {kind}, {batch} × {length} tokens of real text, two layers train (in turns {layers} and "
        f"those below), both ends frozen. CPU seconds of all threads, medians of {2 * rounds} steps and {rounds} "
        f"switches in turns. A product takes {bf16_slowdown():.1f} times as long in bf16 as in fp32 here.",
        command="frozen_cost" + (" --fp32" if fp32 else ""),
        headings=_HEADINGS,
        rows=[_cells(row) for row in rows],
        notes=[
            "Weights of layers: bytes on the device between two steps, as a share of the exact ones.",
            "Left over: whatever else is alive behind a step, beside optimizer state and masters.",
            f"A switch, spread: its share of the time where layers train for {PERIOD} steps.",
        ],
    )


_HEADINGS = (
    "format",
    "layers",
    "of exact",
    "ends",
    "left over",
    "step / exact",
    "switch / step",
    "switch, spread",
)


def _cells(row: dict[str, Any]) -> list[str]:
    mib = {key: f"{row[f'{key}_bytes'] / 2**20:,.1f} MiB" for key in ("layers", "ends", "left_over")}
    return [
        row["format"],
        mib["layers"],
        f"{row['layers_over_exact']:.3f}",
        mib["ends"],
        mib["left_over"],
        f"{row['step_over_exact']:.3f}",
        f"{row['switch_over_step']:.1%}",
        f"{row['switch_share_at_period']:.2%}",
    ]


if __name__ == "__main__":
    typer.run(main)
