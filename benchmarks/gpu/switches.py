"""Time of a switch with state dropped, kept or offloaded, and what of it the next work needn't wait for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from layersample import LayerScheduler

from .bench import Bench, Row, loss_of


def measure(bench: Bench) -> Iterator[Row]:
    """Switch layers a few times under each policy."""
    shape = bench.shape("tinyllama-1.1b")
    for state in ("drop", "keep", "offload"):
        blocked, whole = _switch(bench, shape, state)
        bench.release()
        waited, taken = statistics.median(blocked), statistics.median(whole)
        figures: dict[str, Any] = {"host_seconds": blocked, "whole_seconds": whole}
        found = f"{taken * 1000:.1f} ms"
        if bench.on_gpu:
            found += f", of which the host waits {waited * 1000:.1f} ms"
        yield Row("time of a switch", f"state={state}", found, "", "measured", figures)
    if not bench.on_gpu:
        yield Row("time of a switch", "what overlaps with other work", "", "", "no meaning", {})


def _switch(bench: Bench, shape: Any, state: Any) -> tuple[list[float], list[float]]:
    """Seconds until a switch returns, and until the device has done all of it."""
    model = bench.model(shape, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = bench.tokens(shape, 1, 32)
    blocked, whole = [], []
    with LayerScheduler(model, optimizer, "cyclic", num_active=2, period=1, state=state) as scheduler:
        for _ in range(3 if bench.tiny else 12):
            loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bench.wait()
            started = time.perf_counter()
            scheduler.step()
            blocked.append(time.perf_counter() - started)
            bench.wait()
            whole.append(time.perf_counter() - started)
            optimizer.zero_grad()
    return blocked[1:], whole[1:]
