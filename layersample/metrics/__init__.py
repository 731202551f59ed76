"""What a layer's weights say of it: heavy tails, outliers and the norms of a LoRA adapter."""

from __future__ import annotations

from layersample.metrics.adapter_files import has_lora
from layersample.metrics.adapters import LoraNorms, lora_norms
from layersample.metrics.cache import MetricCache
from layersample.metrics.damping import damped_losses
from layersample.metrics.matrices import WeightMatrix, weight_matrices
from layersample.metrics.measures import (
    METRICS,
    alpha,
    alpha_hat,
    hill,
    log_alpha_norm,
    measure_weight,
    random_hill,
    stable_rank,
)
from layersample.metrics.model import LayerMetrics, MatrixMetrics, layer_metrics
from layersample.metrics.outliers import DEFAULT_THRESHOLDS, outlier_ratios
from layersample.metrics.parallel import map_parallel
from layersample.metrics.power_law import PowerLaw, fit_power_law
from layersample.metrics.probe import probe_lora
from layersample.metrics.spectrum import DegenerateMatrixError, spectrum

__all__ = [
    "DEFAULT_THRESHOLDS",
    "METRICS",
    "DegenerateMatrixError",
    "LayerMetrics",
    "LoraNorms",
    "MatrixMetrics",
    "MetricCache",
    "PowerLaw",
    "WeightMatrix",
    "alpha",
    "alpha_hat",
    "damped_losses",
    "fit_power_law",
    "has_lora",
    "hill",
    "layer_metrics",
    "log_alpha_norm",
    "lora_norms",
    "map_parallel",
    "measure_weight",
    "outlier_ratios",
    "probe_lora",
    "random_hill",
    "spectrum",
    "stable_rank",
    "weight_matrices",
]
