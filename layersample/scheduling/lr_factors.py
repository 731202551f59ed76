"""Learning rates of single layers: a warm-up after each switch, and a correction for how often a layer is drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from layersample.errors import ConfigError
from layersample.scheduling.options import SchedulerOptions
from layersample.scheduling.reports import Reports


def warmup_factor(step: int, warmup: int) -> float:
    """What the learning rate of a layer is multiplied by that has just become active.

    Args:
        step: Optimizer steps done in its period.
        warmup: Steps over which the learning rate rises in equal parts; the last of them has all of it.

    References:
        BREAD, OpenReview DBybUx7ARy.
    """
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def correction_factor(index: int, inclusion: Sequence[float], most: float) -> float:
    """The mean inclusion probability over that of one layer: so all layers move alike in expectation.

    Under an adaptive optimizer a constant on the gradient would cancel; on the learning rate it doesn't.

    Args:
        index: The layer.
        inclusion: The chance of each layer to be active.
        most: The largest factor.
    """
    own = inclusion[index]
    return min(most, sum(inclusion) / len(inclusion) / own) if own > 0 else most


def lr_factors(
    active: Sequence[int],
    *,
    entered: Collection[int],
    step: int,
    warmup: int,
    inclusion: Sequence[float] | None,
    most: float | None,
) -> dict[int, float]:
    """What the learning rates of active layers are multiplied by in the next step; what isn't there has its own.

    Args:
        active: Indices of the active layers.
        entered: Those of them that weren't active in the period before; none in the first.
        step: Optimizer steps done in the period.
        warmup: Steps of the warm-up; 0 is none.
        inclusion: The chance of each layer to be active, if it is known.
        most: Largest factor of the correction; ``None`` doesn't correct.

    Raises:
        ConfigError: If it must correct by a chance that isn't known.
    """
    if most is not None and inclusion is None:
        raise ConfigError(
            "lr_correction needs a sampler that knows the chance of each layer to be active, but this one doesn't: "
            "leave lr_correction out, or choose another sampler."
        )
    found = {}
    for index in active:
        factor = warmup_factor(step, warmup) if index in entered else 1.0
        if most is not None and inclusion is not None:
            factor *= correction_factor(index, inclusion, most)
        if factor != 1.0:
            found[index] = factor
    return found


class SetsLearningRates(Reports):
    """The part of a scheduler that gives layers learning rates of their own."""

    options: SchedulerOptions
    _began: int
    _entered: tuple[int, ...]

    def _set_learning_rates(self) -> None:
        options = self.options
        if options.switch_warmup or options.lr_correction is not None:
            self._switch.set_lr_factors(
                lr_factors(
                    self._active,
                    entered=self._entered,
                    step=self._steps - self._began,
                    warmup=options.switch_warmup,
                    inclusion=self._inclusion,
                    most=options.lr_correction,
                )
            )
