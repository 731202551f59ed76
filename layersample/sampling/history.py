"""Which layers have trained, how often, and how long ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from layersample.sampling.sampler import LayerStatistics


class LayerHistory:
    """The finished periods of a run, layer by layer.

    Args:
        num_layers: Number of layers that are sampled.
    """

    def __init__(self, num_layers: int) -> None:
        self._visits = [0] * num_layers
        self._last_active: list[int | None] = [None] * num_layers
        self.changed = set(range(num_layers))
        """Layers that have trained since they were last measured."""

    def record(self, period: int, active: Iterable[int]) -> None:
        """Note that a period has ended in which some layers trained."""
        for index in active:
            self._visits[index] += 1
            self._last_active[index] = period
            self.changed.add(index)

    @property
    def statistics(self) -> LayerStatistics:
        """What a sampler may know of it."""
        return LayerStatistics(tuple(self._visits), tuple(self._last_active))

    def coverage(self, active: Iterable[int]) -> float:
        """Share of the layers that have trained, those that train now included."""
        trained = {i for i, visits in enumerate(self._visits) if visits} | set(active)
        return len(trained) / len(self._visits)

    def staleness(self, period: int, active: Iterable[int]) -> list[int]:
        """Periods since each layer last trained: 0 for those that train now."""
        now = set(active)
        last = [-1 if then is None else then for then in self._last_active]
        return [0 if i in now else period - then for i, then in enumerate(last)]

    def state_dict(self) -> dict[str, Any]:
        """All of it, of JSON types."""
        return {
            "visits": list(self._visits),
            "last_active": list(self._last_active),
            "changed": sorted(self.changed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._visits, self._last_active = list(state["visits"]), list(state["last_active"])
        self.changed = set(state["changed"])
