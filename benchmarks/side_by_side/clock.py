"""CPU and wall time of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("forward", "backward", "optimizer", "sampling")


class PhaseClock:
    """Adds up the seconds of each part of a step; CPU seconds are those of all threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self._started: dict[str, tuple[float, float]] = {}

    def begin_step(self) -> None:
        """Forget the step before."""
        self.seconds = {}

    def start(self, phase: str) -> None:
        """A part begins."""
        _wait_for_device()
        self._started[phase] = (time.process_time(), time.perf_counter())

    def stop(self, phase: str) -> None:
        """A part ends; one that never began has taken nothing."""
        if phase in self._started:
            _wait_for_device()
            cpu, wall = self._started.pop(phase)
            spent = self.seconds.setdefault(phase, {"cpu": 0.0, "wall": 0.0})
            spent["cpu"] += time.process_time() - cpu
            spent["wall"] += time.perf_counter() - wall

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)


def _wait_for_device() -> None:
    """A GPU works on while Python goes ahead: without waiting, its time would count for whatever comes next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
