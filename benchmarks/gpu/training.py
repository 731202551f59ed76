"""A run of 100 steps from random weights, whose loss must fall: the whole of it, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import mean

import torch

from layersample import LayerScheduler
from layersample.activations.save_memory import save_memory

from .bench import Bench, Job, Row, loss_of

STEPS, LEAST = 100, 0.10


def jobs(bench: Bench) -> dict[str, Job]:
    """One job: the run."""
    return {"training": partial(_measure, bench)}


def _measure(bench: Bench) -> Iterator[Row]:
    """Train on sequences that count upwards, which can be learned from any start."""
    shape = bench.shape("tinyllama-1.1b")
    model = bench.model(shape, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if bench.tiny else 2e-4, fused=True)
    losses = []
    batch, length = (4, 32) if bench.tiny else (8, 256)
    with (
        LayerScheduler(model, optimizer, "lisa", num_active=2, period=10) as scheduler,
        save_memory(model, loss_chunk=128, recompute=True),
    ):
        for step in range(STEPS):
            starts = bench.tokens(shape, batch, 1, seed=step) % 256
            tokens = (starts + torch.arange(length, device=bench.device)) % 256
            loss = loss_of(model, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    before, after = mean(losses[:10]), mean(losses[-10:])
    fell = after <= (1 - LEAST) * before
    yield Row(
        "training",
        f"{STEPS} steps, bf16 on masters",
        f"loss {before:.2f} to {after:.2f}",
        "falls by a tenth",
        "met" if fell else "MISS",
        {"losses": losses},
    )
