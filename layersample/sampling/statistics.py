"""What training tells a sampler of each layer: when it trained, its gradients, and the loss meanwhile."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layersample.errors import ConfigError

logger = logging.getLogger(__name__)

GRADIENTS, LOSS, WEIGHTS = "gradients", "loss", "weights"  # what a sampler's `collects` may name
COLLECTABLE = frozenset({GRADIENTS, LOSS, WEIGHTS})
Norms = tuple[float | None, ...]


@dataclass(frozen=True)
class GradientStatistics:
    """Norms of the layers' gradients, one a layer; ``None`` where a layer hasn't had a finite one yet.

    They are of the whole gradient, not of a projected one, and never multiplied by a ``GradScaler``'s scale.

    Args:
        norm: Frobenius norm, the mean over the steps of the last period in which the layer trained.
        last_norm: The same of the last step alone.
        sizes: Elements of each layer.
    """

    norm: Norms
    last_norm: Norms
    sizes: tuple[int, ...]

    @property
    def rms(self) -> Norms:
        """:attr:`norm` over the square root of the layer's elements: large layers have no advantage."""
        return self._per_element(self.norm)

    def _per_element(self, norms: Norms) -> Norms:
        pairs = zip(norms, self.sizes, strict=True)
        return tuple(None if norm is None else norm / math.sqrt(max(size, 1)) for norm, size in pairs)


@dataclass(frozen=True)
class LossStatistics:
    """The training loss of a period, as far as the loop told it.

    Args:
        told: Steps of the period whose loss was told.
        before: Loss at the period's first step, on the straight line that fits its steps best, because the losses
            of single batches scatter; ``None`` unless two finite ones were told.
        after: Loss at its last step, on the same line.
        last: Loss of the last step; ``None`` before there was one.
    """

    told: int = 0
    before: float | None = None
    after: float | None = None
    last: float | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of each layer from the run so far.

    Gradients, losses and changes of weights are collected for samplers that ask, see ``LayerSampler.collects``.

    Args:
        visits: Number of earlier periods in which each layer trained, one number a layer.
        last_active: The last period in which each layer trained; ``None`` where it hasn't yet.
        period: Number of the period in which this is known.
        gradients: Norms of gradients; ``None`` where they aren't collected.
        losses: The training loss; ``None`` where it isn't collected.
        changes: How far weights moved, see :attr:`weight_change`; ``None`` where that isn't collected.
    """

    visits: tuple[int, ...]
    last_active: tuple[int | None, ...]
    period: int = 0
    gradients: GradientStatistics | None = None
    losses: LossStatistics | None = None
    changes: Norms | None = None

    @property
    def staleness(self) -> tuple[int, ...]:
        """Periods since each layer last trained: 0 if in this one."""
        return tuple(self.period - (-1 if last is None else last) for last in self.last_active)

    @property
    def gradient_norm(self) -> Norms:
        """Frobenius norm of each layer's gradient, the mean over the last period in which it trained."""
        return self._collected_gradients().norm

    @property
    def gradient_rms(self) -> Norms:
        """The same per element: the norm over the square root of the layer's elements."""
        return self._collected_gradients().rms

    @property
    def weight_change(self) -> Norms:
        """Frobenius norm of what each layer's weights moved by in the last period in which it trained.

        ``None`` where it hasn't yet, or where that period's beginning isn't known any more: sharded by FSDP2, of a
        period in which the run was resumed. Otherwise the optimizer's checkpoint holds it.
        """
        if self.changes is None:
            raise _not_collected(WEIGHTS)
        return self.changes

    @property
    def loss(self) -> LossStatistics:
        """The training loss of the period."""
        if self.losses is None:
            raise _not_collected(LOSS)
        return self.losses

    def subset(self, indices: Sequence[int]) -> LayerStatistics:
        """What is known of some of the layers."""
        gradients = self.gradients
        if gradients is not None:
            gradients = GradientStatistics(
                tuple(gradients.norm[i] for i in indices),
                tuple(gradients.last_norm[i] for i in indices),
                tuple(gradients.sizes[i] for i in indices),
            )
        return replace(
            self,
            visits=tuple(self.visits[i] for i in indices),
            last_active=tuple(self.last_active[i] for i in indices),
            gradients=gradients,
            changes=None if self.changes is None else tuple(self.changes[i] for i in indices),
        )

    def _collected_gradients(self) -> GradientStatistics:
        if self.gradients is None:
            raise _not_collected(GRADIENTS)
        return self.gradients


def _not_collected(what: str) -> ConfigError:
    return ConfigError(
        f"The statistic {what!r} isn't collected, because the sampler doesn't ask for it: its class must say "
        f"collects = frozenset({{{what!r}}})."
    )


class GradientRecord:
    """Norms of gradients by layer: sums of the period that runs, means of the last one of each layer.

    Args:
        names: Names of the layers.
        sizes: Elements of each.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._names, self._sizes = tuple(names), tuple(sizes)
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._mean: list[float | None] = [None] * len(names)
        self._last: list[float | None] = [None] * len(names)
        self._named: set[int] = set()

    def add(self, norms: Mapping[int, float]) -> None:
        """Note the norms of one step, by layer. One that isn't finite is said, and counts for nothing.

        Args:
            norms: Frobenius norms; one below 0 is of a step that a ``GradScaler`` left out.
        """
        for index, norm in norms.items():
            if norm < 0:
                continue
            if not math.isfinite(norm):
                if index not in self._named:
                    logger.warning(
                        "The gradient of %s has a norm of %s: its statistics leave this step out.",
                        self._names[index],
                        norm,
                    )
                self._named.add(index)
                continue
            self._sums[index] = self._sums.get(index, 0.0) + norm
            self._counts[index] = self._counts.get(index, 0) + 1
            self._last[index] = norm

    def end_period(self) -> None:
        """Make means of the period's sums."""
        for index, total in self._sums.items():
            self._mean[index] = total / self._counts[index]
        self._sums, self._counts, self._named = {}, {}, set()

    @property
    def statistics(self) -> GradientStatistics:
        """What a sampler may know of it; in the middle of a period the mean is that of the steps so far."""
        mean = [
            self._sums[i] / self._counts[i] if i in self._sums else known
            for i, known in enumerate(self._mean)
        ]
        return GradientStatistics(tuple(mean), tuple(self._last), self._sizes)

    def state_dict(self) -> dict[str, Any]:
        """All of it, of JSON types."""
        running = {str(i): [self._sums[i], self._counts[i]] for i in self._sums}
        return {"running": running, "mean": list(self._mean), "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._sums = {int(i): total for i, (total, _) in state["running"].items()}
        self._counts = {int(i): count for i, (_, count) in state["running"].items()}
        self._mean, self._last = list(state["mean"]), list(state["last"])


class LossRecord:
    """The losses of the period that runs."""

    def __init__(self) -> None:
        self._told: list[tuple[int, float]] = []  # (step of the period, loss)
        self._last: float | None = None

    def add(self, step: int, loss: float) -> None:
        """Note a loss.

        Args:
            step: Optimizer steps that were done in the period before this one.
            loss: Its training loss; one that isn't finite counts as told, and is left out of the line.
        """
        self._told.append((step, loss))
        self._last = loss

    def end_period(self) -> None:
        """Begin another period."""
        self._told = []

    @property
    def statistics(self) -> LossStatistics:
        """What a sampler may know of it."""
        points = [(step, loss) for step, loss in self._told if math.isfinite(loss)]
        if len({step for step, _ in points}) < 2:
            return LossStatistics(len(self._told), last=self._last)
        middle = sum(step for step, _ in points) / len(points)
        mean = sum(loss for _, loss in points) / len(points)
        squares = sum((step - middle) ** 2 for step, _ in points)
        slope = sum((step - middle) * (loss - mean) for step, loss in points) / squares
        first, last = points[0][0], points[-1][0]
        return LossStatistics(
            told=len(self._told),
            before=mean + slope * (first - middle),
            after=mean + slope * (last - middle),
            last=self._last,
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, of JSON types."""
        return {"told": [list(point) for point in self._told], "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._told, self._last = [(step, loss) for step, loss in state["told"]], state["last"]
