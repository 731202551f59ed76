"""How far a step is from both floors, beside other methods: ``python -m layersample_benchmarks.floor_check``.

All methods take turns in one process, on the real model and real text. A method's time is its CPU seconds over those
of full fine-tuning in the same round; its memory is what torch's allocator reports of a step, and what stood before.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.optim.memory_use import optimizer_tensors
from layersample.planning.simulation import schedule_given
from layersample.training.models import load_model

from .floors import flop_floor, memory_floor
from .measured_peak import measured_step_peak
from .methods.baselines import train_blocks
from .methods.catalog import get_method
from .methods.method import Prepared
from .store import RESULTS, store
from .timed import TimedRun, ratios, real_batches

SIZES = ((4, 128), (8, 256))
PRECISIONS = ("fp32", "bf16")
REFERENCE, EXACT = "full fine-tuning", "full fine-tuning, fp32"
MIDDLE = (9, 20)
SETS = {"bottom": (0, 15), "middle": MIDDLE, "top": (28, 29)}
# Bounds: over the floor in time and in memory; and bf16 with masters over full fp32, at the larger size.
TIME, MEMORY, TIME_OF_FP32, MEMORY_OF_FP32 = 1.05, 1.10, 0.40, 0.23

# Positions of a chunk of the loss: fewer in bf16, where everything else is half as large, but not their logits.
CHUNKS = {"fp32": 128, "bf16": 64}
OURS: dict[str, Any] = {
    "embeddings": "freeze",
    "head": "freeze",
    "norm": "freeze",
    "recompute": True,
    "step_in_backward": True,
    "clip": 0.0,
    "clip_by": "running",
}


@dataclass
class Contestant:
    """A method that takes its turns.

    Args:
        run: What trains.
        tensors: Gives what its optimizer holds.
        active: Indices of the layers of ours that train; ``None`` of another method.
    """

    run: TimedRun
    tensors: Callable[[], Iterable[Tensor]]
    active: tuple[int, ...] | None = None


def make_contestant(name: str, folder: str, precision: str) -> Contestant:
    """Load the model, and build what trains it.

    Args:
        name: Name of a row.
        folder: The model's, or a built-in name.
        precision: ``"fp32"``, or ``"bf16"``, in which ours has exact masters.
    """
    bf16 = precision == "bf16" and name != EXACT
    model: nn.Module = load_model(folder, torch.bfloat16 if bf16 else torch.float32)[0].train()
    options = {"precision": precision, "learning_rate": 1e-5, "weight_decay": 0.0, "master_weights": False}
    if name.startswith("layersample"):
        active = SETS[name.split()[-1]]
        own = {**OURS, "loss_chunk": CHUNKS[precision], "master_weights": True}
        return _sample(model, active, TrainConfig(**{**options, **own}), active)
    if name == "LISA as published":
        return _sample(model, MIDDLE, TrainConfig(**options, state="keep", loss_chunk=0, recompute=False))
    if name == "BAdam":
        prepared = train_blocks(model, TrainConfig(**options, period=10**6), first=MIDDLE[0])
    elif name in ("LoRA", "LoRA-FA"):
        prepared = get_method(name.lower()).prepare(model, TrainConfig(**options))
    else:
        prepared = Prepared(model)
    optimizer = prepared.optimizer or _adamw(prepared.model)
    run = TimedRun(prepared.model, optimizer, None)
    return Contestant(run, prepared.optimizer_tensors or (lambda: optimizer_tensors(optimizer)))


def _sample(
    model: nn.Module, layers: tuple[int, ...], config: TrainConfig, active: tuple[int, ...] | None = None
) -> Contestant:
    optimizer = _adamw(model)
    scheduler = schedule_given(model, optimizer, config, layers)
    save_memory(model, loss_chunk=config.chunk_positions, recompute=config.recompute)
    return Contestant(TimedRun(model, optimizer, scheduler), lambda: optimizer_tensors(optimizer), active)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)


def measure(folder: str, batch: int, length: int, precision: str, rounds: int) -> list[dict[str, Any]]:
    """Let all methods take turns at one size and precision; the first round isn't counted."""
    batches = real_batches(folder, batch, length)
    names = [REFERENCE, *([EXACT] if precision == "bf16" else []), "LISA as published", "LoRA", "LoRA-FA"]
    names += ["BAdam", *(f"layersample, {where}" for where in SETS)]
    contestants = {name: make_contestant(name, folder, precision) for name in names}
    for round in range(rounds + 1):
        for contestant in contestants.values():
            contestant.run.step(batches[round % len(batches)])
    seconds = {name: contestant.run.cpu_seconds[1:] for name, contestant in contestants.items()}
    exact = seconds.get(EXACT, seconds[REFERENCE])
    config = cast(LlamaConfig, contestants[REFERENCE].run.model.config)
    rows: list[dict[str, Any]] = []
    for name, contestant in contestants.items():
        own, active = seconds[name], contestant.active
        row: dict[str, Any] = {
            "size": f"{batch} × {length}",
            "precision": precision,
            "method": name,
            "cpu_seconds": statistics.median(own),
            "step_over_full": statistics.median(ratios(own, seconds[REFERENCE])),
            "step_over_full_fp32": statistics.median(ratios(own, exact)),
            "peak_bytes": measured_step_peak(
                contestant.run.model, contestant.tensors(), partial(contestant.run.step, batches[0])
            ),
        }
        if active is not None:
            itemsize = 2 if precision == "bf16" else 4
            flops = flop_floor(config, batch, length, active, embedding=False)
            held = memory_floor(config, batch, length, active, itemsize=itemsize)
            row |= {"flop_floor": flops, "step_over_floor": row["step_over_full"] / flops}
            row |= {"memory_floor": held, "peak_over_floor": row["peak_bytes"] / held}
        rows.append(row)
    peaks = {row["method"]: row["peak_bytes"] for row in rows}
    for row in rows:
        row["peak_over_full"] = row["peak_bytes"] / peaks[REFERENCE]
        row["peak_over_full_fp32"] = row["peak_bytes"] / peaks.get(EXACT, peaks[REFERENCE])
    return rows


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What the figures say of each bound."""
    ours = [row for row in rows if "flop_floor" in row]
    size = f"{SIZES[-1][0]} × {SIZES[-1][1]}"
    large = [row for row in ours if (row["precision"], row["size"]) == ("bf16", size)]
    exact = f"bf16 with exact masters at {size}"
    bounds = (
        ("step over the FLOP floor", ours, "step_over_floor", TIME),
        ("peak over the memory floor", ours, "peak_over_floor", MEMORY),
        (f"{exact}, step over full fp32", large, "step_over_full_fp32", TIME_OF_FP32),
        (f"{exact}, peak over full fp32", large, "peak_over_full_fp32", MEMORY_OF_FP32),
    )
    said = []
    for what, among, key, bound in bounds:
        if not among:
            continue
        over = [row for row in among if row[key] > bound]
        where = "; ".join(f"{r['method']}, {r['precision']}, {r['size']}: {r[key]:.3f}" for r in over)
        values = [row[key] for row in among]
        verdict = f"bound {bound:.2f} missed by {where}" if over else f"bound {bound:.2f} met by all"
        said.append(f"{what}: {min(values):.3f} to {max(values):.3f}; {verdict}.")
    return said


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder, of a Llama.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each method that count.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure steps and peaks beside their floors, print the table, and store it."""
    rows: list[dict[str, Any]] = []
    for batch, length in SIZES:
        for precision in PRECISIONS:
            rows += measure(model, batch, length, precision, rounds)
            gc.collect()
    store(
        output,
        "floor_check",
        {"rounds": rounds, "ours": OURS, "chunks": CHUNKS, "rows": rows},
        title="A step beside its floors",
        about="SmolLM2-135M, real text without padding, every token with a label, AdamW, no clipping. Ours: 2 layers "
        "(bottom 0 and 15, middle 9 and 20, top 28 and 29), embedding frozen, loss in chunks of "
        f"{CHUNKS['fp32']} positions ({CHUNKS['bf16']} in bf16), selective recomputation, step in backward, in bf16 "
        "exact fp32 masters. LISA as published: layers 9 and 20 with the embedding, all state kept; BAdam: layer 9; "
        f"LoRA: rank 16; all in plain bf16 there. {rounds} rounds in turns, medians of ratios within a round, CPU "
        "seconds of all threads; peak: allocator.",
        command=f"floor_check --rounds {rounds}",
        headings=_HEADINGS,
        rows=[_cells(row) for row in rows],
        notes=judge(rows),
    )


_HEADINGS = (
    "tokens",
    "precision",
    "method",
    "step / full",
    "FLOP floor",
    "step / floor",
    "peak",
    "peak / full",
    "memory floor",
    "peak / floor",
    "step / full fp32",
    "peak / full fp32",
)


def _cells(row: dict[str, Any]) -> list[str]:
    def ratio(key: str) -> str:
        return f"{row[key]:.3f}" if key in row else ""

    floor = f"{row['memory_floor'] / 2**20:,.0f} MiB" if "memory_floor" in row else ""
    return [
        *(row[key] for key in ("size", "precision", "method")),
        *(ratio(key) for key in ("step_over_full", "flop_floor", "step_over_floor")),
        f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        ratio("peak_over_full"),
        floor,
        *(ratio(key) for key in ("peak_over_floor", "step_over_full_fp32", "peak_over_full_fp32")),
    ]


if __name__ == "__main__":
    typer.run(main)
