"""What the head and its loss cost: the plain loss, torch's, TRL's and ours, in turns.

``python -m layersample_benchmarks.head_cost``
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from layersample.activations.chunked_cross_entropy import chunked_cross_entropy

from .measured_peak import measured_peak
from .store import RESULTS, store

POSITIONS, HIDDEN, VOCABULARY = 512, 576, 49152  # SmolLM2-135M at 4 × 128 tokens
TRL_CHUNK = 32768  # what its trainers give
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss as transformers computes it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's, as its SFTTrainer calls it off the GPU: every position, with entropy and accuracy."""
    outputs = ("log_probs", "entropy", "is_top1")
    log_probs = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, outputs
    )[0]
    labelled = targets != -100
    loss: Tensor = -log_probs.masked_fill(~labelled, 0).sum() / labelled.sum()
    return loss


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours."""
    return chunked_cross_entropy(hidden, weight, None, targets)


def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own fused head."""
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets)
    return loss


LOSSES: dict[str, Loss] = {
    "plain": plain,
    "torch linear_cross_entropy": by_torch,
    "TRL": trl,
    "layersample": ours,
}


def measure(dtype: torch.dtype, masked: float, trained: bool, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of forward and backward, medians over rounds in turns, and peak bytes of each."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    targets[torch.rand(POSITIONS, generator=generator) < masked] = -100

    def run(loss: Loss) -> None:
        loss(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
        hidden.grad = weight.grad = None

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds + 1):
        for name, loss in LOSSES.items():
            started = time.process_time()
            run(loss)
            seconds[name].append(time.process_time() - started)
    return [
        {
            "loss": name,
            "dtype": str(dtype).removeprefix("torch."),
            "masked": masked,
            "head": "trained" if trained else "frozen",
            "cpu_seconds": statistics.median(seconds[name][1:]),  # the first one warms up
            "peak_bytes": measured_peak(partial(run, loss)),
        }
        for name, loss in LOSSES.items()
    ]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each loss is measured.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print the table, and store it."""
    rows = [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for masked, trained in ((0.0, False), (0.6, False), (0.0, True))
        for row in measure(dtype, masked, trained, rounds)
    ]
    store(
        output,
        "head_cost",
        {"rounds": rounds, "rows": rows},
        title="What the head and its loss cost",
        about=f"Forward and backward, {POSITIONS} positions, hidden size {HIDDEN}, vocabulary {VOCABULARY:,} "
        f"(SmolLM2-135M at 4 × 128 tokens); CPU seconds, medians of {rounds} rounds in turns; "
        "peak bytes beyond the inputs, as torch's allocator reports them.",
        command=f"head_cost --rounds {rounds}",
        headings=("type", "masked", "head", "loss", "CPU seconds", "peak"),
        rows=[_cells(row) for row in rows],
    )


def _cells(row: dict[str, Any]) -> list[str]:
    first = [row["dtype"], f"{row['masked']:.0%}", row["head"], row["loss"]]
    return [*first, f"{row['cpu_seconds']:.2f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB"]


if __name__ == "__main__":
    typer.run(main)
