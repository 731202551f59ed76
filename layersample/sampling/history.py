"""Which layers have trained, how often, how long ago, and what their gradients and the loss were."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from layersample.sampling.statistics import (
    GRADIENTS,
    LOSS,
    WEIGHTS,
    GradientRecord,
    LayerStatistics,
    LossRecord,
)


class LayerHistory:
    """The finished periods of a run, layer by layer.

    Args:
        num_layers: Number of layers that are sampled.
        collects: What is collected beside: ``"gradients"``, ``"loss"``, ``"weights"``.
        names: Names of the layers, for gradients.
        sizes: Elements of each, for gradients.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        collects: Collection[str] = (),
        names: Sequence[str] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        self.gradients = GradientRecord(names, sizes) if GRADIENTS in collects else None
        self.losses = LossRecord() if LOSS in collects else None
        self._changes: list[float | None] | None = [None] * num_layers if WEIGHTS in collects else None
        self._visits = [0] * num_layers
        self._last_active: list[int | None] = [None] * num_layers
        self.changed = set(range(num_layers))
        """Layers whose weights have moved since they were last measured."""

    def record(self, period: int, active: Iterable[int], *, moved: Iterable[int] = ()) -> None:
        """Note that a period has ended.

        Args:
            period: Its number.
            active: Layers that trained in it.
            moved: Layers whose weights moved though they weren't active.
        """
        self.changed.update(moved)
        for index in active:
            self._visits[index] += 1
            self._last_active[index] = period
            self.changed.add(index)

    def record_changes(self, norms: Mapping[int, float | None]) -> None:
        """Note how far weights moved in a period, by layer: ``None`` isn't known; NaN counts for nothing."""
        if self._changes is not None:
            for index, norm in norms.items():
                self._changes[index] = norm if norm is None or isfinite(norm) else self._changes[index]

    def statistics(self, period: int) -> LayerStatistics:
        """What a sampler may know of it in a period."""
        return LayerStatistics(
            tuple(self._visits),
            tuple(self._last_active),
            period,
            None if self.gradients is None else self.gradients.statistics,
            None if self.losses is None else self.losses.statistics,
            None if self._changes is None else tuple(self._changes),
        )

    def end_period(self) -> None:
        """Begin the sums of gradients and losses anew."""
        for record in (self.gradients, self.losses):
            if record is not None:
                record.end_period()

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
            "gradients": None if self.gradients is None else self.gradients.state_dict(),
            "losses": None if self.losses is None else self.losses.state_dict(),
            "changes": None if self._changes is None else list(self._changes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._visits, self._last_active = list(state["visits"]), list(state["last_active"])
        self.changed = set(state["changed"])
        # Not there in states of earlier versions, and of samplers that collect nothing.
        if self.gradients is not None and state.get("gradients"):
            self.gradients.load_state_dict(state["gradients"])
        if self.losses is not None and state.get("losses"):
            self.losses.load_state_dict(state["losses"])
        if self._changes is not None and state.get("changes"):
            self._changes = list(state["changes"])
