"""OwLore: layers with more outliers, or heavier tails, are drawn more often."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from layersample import ConfigError, MeasuredSampler, Measurement, register
from layersample.metrics import (
    DEFAULT_THRESHOLDS,
    layer_metrics,
    outlier_ratios,
    random_hill,
    weight_matrices,
)

logger = logging.getLogger(__name__)

Metric = Literal["outlier", "alpha", "hill"]
Baseline = Literal["module", "random"]


@register("owlore")
@dataclass(kw_only=True, eq=False)
class OwLore(MeasuredSampler):
    """Draw layers by their outliers or the heaviness of their tails (OwLore).

    A layer's probability is its share of the scores, p_l = D_l / ΣD. The low-rank projection of the method is
    not part of the sampler. Of parts of layers, each is compared with itself: an outlier stands out of its own part.

    Args:
        metric: ``"outlier"`` is OWL's layer outlier distribution: percent of weights whose |W|·‖X‖₂ is above
            ``threshold`` times the layer's mean; it needs calibration batches, which a Trainer's callback
            takes from the training data. ``"alpha"`` is 1 / the mean power-law exponent of the layer's
            matrices, as weightwatcher defines it: a heavier tail, a higher probability. ``"hill"`` is the same
            with PL_Alpha_Hill relative to ``baseline``, because the aspect ratio of a matrix dominates it.
        threshold: M of ``"outlier"``: 13 in OwLore's file for LLaMA2-7B, 3 by default in OWL. Where too few
            layers have outliers at M, the largest of 3, 5, 7, 10, 13 below it that serves is taken, and said.
        num_batches: Calibration batches of ``"outlier"``, at most; at least 1.
        baseline: What ``"hill"`` is compared with: ``"module"``, the mean over the layers of the same module;
            ``"random"``, a Gaussian matrix of the same shape.

    References:
        OwLore, arXiv 2405.18380 (M from its repository's file); OWL, arXiv 2310.05175; weightwatcher 0.7.7;
        AlphaPruning, arXiv 2410.10912.
    """

    source = "arXiv 2405.18380"

    metric: Metric = "outlier"
    threshold: float = 13.0
    num_batches: int = 8
    baseline: Baseline = "module"

    def __post_init__(self) -> None:
        super().__post_init__()
        options = (("metric", self.metric, Metric), ("baseline", self.baseline, Baseline))
        for name, value, allowed in options:
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, but got {value!r}.")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, but got {self.threshold}.")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, but got {self.threshold}.")
        if self.num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, but got {self.num_batches}.")
        self._serving = (
            self.threshold
        )  # the M that is used, where too few layers have outliers at the one asked for
        # Hill of each matrix of each layer, kept because layers are compared with one another.
        self._hills: dict[str, dict[str, float]] = {}

    def measure(self, measurement: Measurement) -> None:
        """Score the layers that have changed."""
        layers = measurement.model_layers
        held = {matrix.layer for matrix in weight_matrices(measurement.model, layers)}
        # A part of a layer that holds no matrix, such as a norm, gets the mean score.
        changed = [
            layer
            for layer in layers.layers
            if layer.name in measurement.changed and (layer.within is None or layer.name in held)
        ]
        if not changed:
            return
        # Weights that have trained are never met again: only the first measurement is worth keeping on disk.
        cache = not self.scores
        some = replace(measurement, model_layers=replace(measurement.model_layers, layers=tuple(changed)))
        progress = measurement.pace("Spectra of the layers' matrices")
        if self.metric == "outlier":
            self.scores.update(self._count_outliers(some))
        elif self.metric == "alpha":
            metrics = layer_metrics(some.model, some.model_layers, ("alpha",), cache=cache, progress=progress)
            self.scores.update({name: 1 / alpha for name, alpha in metrics.by_layer("alpha").items()})
        else:
            metrics = layer_metrics(some.model, some.model_layers, ("hill",), cache=cache, progress=progress)
            for layer in changed:
                self._hills[layer.name] = {
                    m.name.removeprefix(layer.layer): m.values["hill"] / self._expected_hill(m.shape)
                    for m in metrics.matrices
                    if m.layer == layer.name and "hill" in m.values
                }
            self.scores = _invert(_relate(self._hills) if self.baseline == "module" else self._hills)
        logger.info("scores of %s by layer: %s", self.metric, self.scores)

    @property
    def outlier_threshold(self) -> float | None:  # type: ignore[override]
        """The M that serves, where outliers are counted."""
        return self._serving if self.metric == "outlier" else None

    @property
    def needs_batches(self) -> bool:  # type: ignore[override]
        """Whether outliers are counted."""
        return self.metric == "outlier"

    def state_dict(self) -> dict[str, Any]:
        """The scores, what they come from, and the M that serves."""
        return {**super().state_dict(), "hills": self._hills, "threshold": self._serving}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self._hills, self._serving = dict(state["hills"]), state["threshold"]

    def _expected_hill(self, shape: tuple[int, int]) -> float:
        return random_hill(shape) if self.baseline == "random" else 1.0

    def _count_outliers(self, measurement: Measurement) -> dict[str, float]:
        if measurement.batches is None:
            raise ConfigError(
                "The sampler 'owlore' counts outliers on calibration batches, but got none: give batches= to the "
                "scheduler, or choose metric='alpha' or 'hill', which need no data."
            )
        thresholds = sorted({*DEFAULT_THRESHOLDS, self._serving})
        ratios = outlier_ratios(
            measurement.model,
            measurement.read("Counting outliers", self.num_batches),
            measurement.model_layers,
            thresholds,
        )
        if not self.scores:  # the first measurement: all layers
            self._choose_threshold(ratios, measurement.num_active, measurement.warn)
        return {layer: by_threshold[self._serving] for layer, by_threshold in ratios.items()}

    def _choose_threshold(
        self, ratios: Mapping[str, Mapping[float, float]], num_active: int, warn: Callable[[str], None]
    ) -> None:
        wanted = self._serving
        for threshold in [wanted, *(t for t in reversed(DEFAULT_THRESHOLDS) if t < wanted)]:
            found = sum(by_threshold[threshold] > 0 for by_threshold in ratios.values())
            if found >= min(len(ratios), num_active + 1):
                break
        else:
            return  # the draw will say that there are too few
        if threshold != wanted:
            warn(
                f"At M={wanted:g} too few of the {len(ratios)} layers have outliers to draw from; "
                f"M={threshold:g} is used."
            )
            self._serving = threshold


def _relate(hills: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Each layer's Hill of a module over the mean Hill of that module in all layers."""
    of_module: dict[str, list[float]] = {}
    for matrices in hills.values():
        for module, value in matrices.items():
            of_module.setdefault(module, []).append(value)
    means = {module: sum(values) / len(values) for module, values in of_module.items()}
    return {
        layer: {module: value / means[module] for module, value in matrices.items()}
        for layer, matrices in hills.items()
    }


def _invert(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """1 / the mean over a layer's matrices: a heavier tail, a higher score."""
    return {layer: len(matrices) / sum(matrices.values()) for layer, matrices in values.items() if matrices}
