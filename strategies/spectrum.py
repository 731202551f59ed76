"""Spectrum: layers whose matrices have the most signal above the noise of a random matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layersample import MeasuredSampler, Measurement, SamplingContext, register
from layersample.metrics import DegenerateMatrixError, map_parallel, spectrum, weight_matrices

Choose = Literal["top", "draw"]


def signal_to_noise(singular: NDArray[np.float64], shape: tuple[int, int]) -> float:
    """Return SNR = Σ_{s > t} s / Σ_{s ≤ t} s / s_max of a matrix.

    The threshold is t = IQR(s) / 1.349 · (1 + √β) with β = min(m, n) / max(m, n): what noise of that spread could
    reach, by Marchenko and Pastur's law.

    Args:
        singular: The matrix's singular values.
        shape: Its shape ``(m, n)``.
    """
    low, high = np.quantile(singular, [0.25, 0.75])
    threshold = (high - low) / 1.349 * (1 + math.sqrt(min(shape) / max(shape)))
    signal, noise = singular[singular > threshold].sum(), singular[singular <= threshold].sum()
    # All of it is signal where the values hardly differ: the code divides by 1 then.
    return float(signal / (noise or 1.0) / singular.max())


@register("spectrum")
@dataclass(kw_only=True, eq=False)
class Spectrum(MeasuredSampler):
    """Choose layers by the ratio of signal to noise in the spectra of their weights (Spectrum).

    SNR = Σ_{s > t} s / Σ_{s ≤ t} s / s_max over a matrix's singular values s, with t = IQR(s) / 1.349 · (1 + √β),
    β the ratio of the smaller to the larger dimension. A layer's score is the mean, over its matrices, of their SNR
    relative to the mean SNR of the same matrix in all layers, since modules differ more than layers do.

    The authors unfreeze the top n percent of each type of module, for the whole run. ``choose="top"`` trains the
    ``num_active`` layers (with ``granularity="module"``, modules) with the highest scores throughout, and the others
    never: over all types together, since a score is relative to its type.

    Args:
        choose: ``"draw"`` draws layers in proportion to their scores; ``"top"`` always takes the highest ones.

    References:
        arXiv 2406.06623 and the authors' code.
    """

    source = "arXiv 2406.06623"

    choose: Choose = "draw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose not in get_args(Choose):
            raise ValueError(f"choose must be one of {', '.join(get_args(Choose))}, but got {self.choose!r}.")
        self._ratios: dict[str, dict[str, float]] = {}

    def measure(self, measurement: Measurement) -> None:
        """Score the layers."""
        progress = measurement.pace("Spectra of the layers' matrices")
        matrices = weight_matrices(measurement.model, measurement.model_layers)
        changed = [matrix for matrix in matrices if matrix.layer in measurement.changed]
        found = map_parallel(lambda matrix: _ratio(matrix.weight), changed, progress=progress)
        layer_of = {unit.name: unit.layer for unit in measurement.model_layers.layers}
        for matrix, ratio in zip(changed, found, strict=True):
            if ratio is not None:
                kind = matrix.name.removeprefix(layer_of[matrix.layer])
                self._ratios.setdefault(matrix.layer, {})[kind] = ratio
        by_kind: dict[str, list[float]] = {}
        for of_layer in self._ratios.values():
            for kind, ratio in of_layer.items():
                by_kind.setdefault(kind, []).append(ratio)
        means = {kind: sum(ratios) / len(ratios) or 1.0 for kind, ratios in by_kind.items()}
        self.scores = {
            layer: sum(ratio / means[kind] for kind, ratio in own.items()) / len(own)
            for layer, own in self._ratios.items()
        }

    def weights(self, context: SamplingContext) -> list[float]:
        """Return the scores; with ``choose="top"``, 1 for the highest and 0 for the others."""
        scores = super().weights(context)
        if self.choose == "draw":
            return scores
        top = context.take(sorted(range(context.num_layers), key=lambda index: (-scores[index], index)))
        return [float(index in top) for index in range(context.num_layers)]

    def state_dict(self) -> dict[str, Any]:
        """The scores, and the ratios they come from."""
        return {**super().state_dict(), "ratios": self._ratios}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self._ratios = dict(state["ratios"])


def _ratio(weight: Tensor) -> float | None:
    """The ratio of one matrix; None where it has none (all zero, not finite)."""
    try:
        singular = np.sqrt(spectrum(weight).numpy())
    except DegenerateMatrixError:
        return None
    return signal_to_noise(singular, (weight.shape[0], weight.shape[1])) if singular.max() > 0 else None
