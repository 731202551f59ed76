"""Memory over many switches: with state dropped or offloaded it must not grow, on the device or in its allocator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from layersample import LayerScheduler, measure_memory

from .bench import Bench, Job, Row, loss_of

SWITCHES, BOUND = 50, 0.01

_WAYS: dict[str, dict[str, Any]] = {
    "state=drop": {"state": "drop"},
    "state=offload": {"state": "offload"},
    "state=drop, frozen_weights=int8": {"state": "drop", "frozen_weights": "int8"},
}
_UNUSED = "reserved but unused"


def jobs(bench: Bench) -> dict[str, Job]:
    """A job for each way that must stay flat."""
    return {name: partial(_measure, bench, name) for name in _WAYS}


def _measure(bench: Bench, way: str) -> Iterator[Row]:
    """Train 50 periods of one step."""
    for what, sizes in _train(bench, _WAYS[way]).items():
        name = f"{what} over {SWITCHES} switches, {way}"
        if not sizes:
            yield Row("flat memory", name, "", "", "no meaning", {})
            continue
        # From the second turn through the layers on: by then everything has been there once.
        early, late = max(sizes[: len(sizes) // 2]), max(sizes[len(sizes) // 2 :])
        flat = late <= early * (1 + BOUND)
        found = f"{late / 2**20:.1f} MiB at most, {late / max(early, 1) - 1:+.1%} in the second half"
        yield Row("flat memory", name, found, "at most +1%", "met" if flat else "MISS", {"bytes": sizes})


def _train(bench: Bench, options: dict[str, Any]) -> dict[str, list[int]]:
    """Bytes of each kind behind each switch; none of an allocator that isn't a GPU's.

    What is reserved beyond what is allocated is the allocator's fragmentation, beside what it keeps for the next step.
    """
    model = bench.model(bench.shape("tinyllama-1.1b"), torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = bench.tokens(model.config, 1, 32)
    held: dict[str, list[int]] = {"optimizer state": [], "allocated": [], "reserved": [], _UNUSED: []}
    with LayerScheduler(model, optimizer, "cyclic", num_active=2, period=1, **options) as scheduler:
        for _ in range(SWITCHES):
            loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            held["optimizer state"].append(measure_memory(model, optimizer).optimizer_state)
            if bench.on_gpu:
                allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
                held["allocated"].append(allocated)
                held["reserved"].append(reserved)
                held[_UNUSED].append(reserved - allocated)
    return held
