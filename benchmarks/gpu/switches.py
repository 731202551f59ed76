"""Time of a switch with state dropped, kept or offloaded, and what of it the next step hides."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from layersample import LayerSampler, LayerScheduler, SamplingContext

from .bench import Bench, Job, Row, loss_of

_WAYS: dict[str, dict[str, Any]] = {
    "state=drop": {"state": "drop"},
    "state=keep": {"state": "keep"},
    "state=offload": {"state": "offload"},
    "state=drop, masters": {"state": "drop", "master_weights": True},
    "state=drop, frozen_weights=int8": {"state": "drop", "frozen_weights": "int8"},
}


def jobs(bench: Bench) -> dict[str, Job]:
    """A job for each way of leaving a layer."""
    return {name: partial(_measure, bench, name) for name in _WAYS}


def _measure(bench: Bench, way: str) -> Iterator[Row]:
    seconds = _switch(bench, _WAYS[way])
    switch, step, both = (statistics.median(seconds[key]) for key in ("switch", "step", "both"))
    found = f"{switch * 1000:.1f} ms beside a step of {step * 1000:.1f} ms"
    if not bench.on_gpu:
        yield Row("time of a switch", way, found, "", "measured", {"seconds": seconds})
        yield Row("overlap of a switch", way, "", "", "no meaning", {})
        return
    yield Row("time of a switch", way, found, "", "measured", {"seconds": seconds})
    added = both - step
    hidden = min(max(1 - added / switch, 0.0), 1.0)
    found = f"adds {added * 1000:.1f} ms to the step behind it: {hidden:.0%} overlaps"
    yield Row("overlap of a switch", way, found, "", "measured", {"added_seconds": added, "overlap": hidden})


def _switch(bench: Bench, options: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of a switch alone, of a step alone, and of both without a wait between them.

    They are those of the host's clock from one standstill of the device to the next: a switch waits on the host for
    copies, which events on the device's stream don't see.
    """
    shape = bench.shape("tinyllama-1.1b")
    model = bench.model(shape, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = bench.tokens(shape, 1, 32) if bench.tiny else bench.tokens(shape, 4, 512)
    seconds: dict[str, list[float]] = {"switch": [], "step": [], "both": []}
    given = {"master_weights": False, **options}
    with LayerScheduler(model, optimizer, _Alternate(), num_active=2, period=1, **given) as scheduler:

        def step() -> None:
            loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        def both() -> None:
            scheduler.step()
            step()

        for turn in range(3 if bench.tiny else 12):
            taken = {"step": bench.clock(step), "switch": bench.clock(scheduler.step)}
            step()  # state for the next switch to move
            taken["both"] = bench.clock(both)  # on the layers that "step" was of
            for key, value in taken.items() if turn else ():  # by then each layer has had its state
                seconds[key].append(value)
    return seconds


class _Alternate(LayerSampler):
    """Two pairs of layers in turns: behind two switches the same layers train again."""

    def sample(self, context: SamplingContext) -> Sequence[int]:
        half = context.num_layers // 2
        return (half, half + 1) if context.round % 2 else (half - 2, half - 1)
