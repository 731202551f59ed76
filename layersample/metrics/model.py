"""Measure the layers of a model by the spectra of their weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from layersample.errors import ConfigError, unknown
from layersample.layers.find import ModelLayers
from layersample.metrics.cache import MetricCache, hash_weight
from layersample.metrics.matrices import WeightMatrix, weight_matrices
from layersample.metrics.measures import PARAMETERS, check_metrics, measure_eigenvalues
from layersample.metrics.parallel import Progress, map_parallel
from layersample.metrics.reference import measure_with_weightwatcher
from layersample.metrics.spectrum import DegenerateMatrixError, check_weight, compute_eigenvalues

logger = logging.getLogger(__name__)

Backend = Literal["own", "weightwatcher"]
DEFAULT_METRICS = ("alpha", "hill", "stable_rank")
_TRIED = 256  # rows and columns of the matrix of noise by which time is estimated

Measured = tuple[dict[str, float], dict[str, str]]


@dataclass(frozen=True)
class MatrixMetrics:
    """What was measured on one matrix.

    Args:
        name: Name of its parameter, with ``[expert]`` behind it for an expert of a fused weight.
        layer: Name of its layer or group.
        shape: Its shape ``(m, n)``.
        values: The metrics that it has.
        problems: The metrics that aren't defined for it, with the reason.
    """

    name: str
    layer: str
    shape: tuple[int, int]
    values: dict[str, float]
    problems: dict[str, str]


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics of each weight matrix of a model.

    Args:
        matrices: One entry a matrix, in the model's order.
        metrics: Names of the metrics.
    """

    matrices: tuple[MatrixMetrics, ...]
    metrics: tuple[str, ...]

    def by_layer(self, metric: str) -> dict[str, float]:
        """Return the mean of a metric over each layer's matrices, in the order of the layers.

        Matrices that the metric isn't defined for are left out.

        Raises:
            DegenerateMatrixError: If a layer has no matrix that the metric is defined for.
            ConfigError: If the metric wasn't measured.
        """
        if metric not in self.metrics:
            raise ConfigError(unknown("measured metric", metric, self.metrics))
        values: dict[str, list[float]] = {matrix.layer: [] for matrix in self.matrices}
        for matrix in self.matrices:
            if metric in matrix.values:
                values[matrix.layer].append(matrix.values[metric])
        for layer, found in values.items():
            if not found:
                first = next(matrix for matrix in self.matrices if matrix.layer == layer)
                raise DegenerateMatrixError(
                    f"{metric} needs at least one matrix of {layer} that it is defined for, but it has none. "
                    f"{first.name}: {first.problems[metric]}"
                )
        return {layer: sum(found) / len(found) for layer, found in values.items()}


def layer_metrics(
    model: nn.Module,
    layers: ModelLayers | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    backend: Backend = "own",
    cache: bool = True,
    embeddings: bool = False,
    progress: Progress | None = None,
) -> LayerMetrics:
    """Measure every weight matrix of a model's layers.

    Args:
        model: Any model that ``find_layers`` works on; it isn't changed.
        layers: Its layers; found by default. To measure a few again, replace its ``layers`` by those.
        metrics: Names from `METRICS`.
        backend: ``"own"``, or ``"weightwatcher"`` to run weightwatcher itself on the same matrices: the
            reference, several times slower and never cached.
        cache: Whether to keep the values on disk and take them from there. Turn it off where weights change
            all the time: each measurement leaves a small file.
        embeddings: Whether to measure the embeddings and the head too, of any size.
        progress: Called with (matrices done, all matrices).

    Raises:
        ConfigError: If a metric or the backend is unknown, or there is no matrix to measure.
    """
    names = check_metrics(metrics)
    if backend not in get_args(Backend):
        raise ConfigError(unknown("backend", backend, get_args(Backend)))
    matrices = weight_matrices(model, layers, embeddings=embeddings)
    if not matrices:
        raise ConfigError(
            f"The layers of {type(model).__name__} must have weight matrices, but they have none."
        )
    for matrix in matrices:
        try:
            check_weight(matrix.weight)
        except ValueError as error:
            raise ConfigError(f"{matrix.name}: {error}") from error
    if backend == "weightwatcher":
        measured = measure_with_weightwatcher([matrix.weight for matrix in matrices], names)
        if progress is not None:
            progress(len(matrices), len(matrices))
    else:
        store = MetricCache() if cache else None
        measured = map_parallel(lambda matrix: _measure(matrix, names, store), matrices, progress=progress)
    rows = tuple(
        MatrixMetrics(matrix.name, matrix.layer, (matrix.weight.shape[0], matrix.weight.shape[1]), *found)
        for matrix, found in zip(matrices, measured, strict=True)
    )
    _warn(rows)
    return LayerMetrics(rows, names)


def estimate_seconds(model: nn.Module, layers: ModelLayers | None = None) -> tuple[int, float]:
    """How many matrices :func:`layer_metrics` would measure, and about how long that takes here without a cache.

    One matrix of noise is measured; the others are taken to cost in proportion to the products of their shorter side.

    Args:
        model: Any model that ``find_layers`` works on.
        layers: Its layers; found by default.

    Returns:
        Their number, and seconds.
    """
    shapes = [matrix.weight.shape for matrix in weight_matrices(model, layers)]
    began = time.perf_counter()
    compute_eigenvalues(torch.randn(_TRIED, _TRIED, generator=torch.Generator().manual_seed(0)))
    took = time.perf_counter() - began
    costs = [min(shape) ** 2 * sum(shape) / (2 * _TRIED**3) for shape in shapes]
    return len(shapes), took * sum(costs) / torch.get_num_threads()


def _measure(matrix: WeightMatrix, metrics: Iterable[str], cache: MetricCache | None) -> Measured:
    digest = hash_weight(matrix.weight) if cache else ""
    values: dict[str, float] = {}
    if cache:
        stored = {name: cache.load(digest, name, PARAMETERS[name]) for name in metrics}
        values = {name: value for name, value in stored.items() if value is not None}
    missing = [name for name in metrics if name not in values]
    if not missing:
        return values, {}
    try:
        found, problems = measure_eigenvalues(compute_eigenvalues(matrix.weight), missing)
    except DegenerateMatrixError as error:  # the weight itself: NaN or infinite
        return values, dict.fromkeys(missing, str(error))
    if cache:
        for name, value in found.items():
            cache.store(digest, name, PARAMETERS[name], value)
    return {name: (values | found)[name] for name in metrics if name in values or name in found}, problems


def _warn(rows: Sequence[MatrixMetrics]) -> None:
    for row in rows:
        for problem in dict.fromkeys(row.problems.values()):
            logger.warning("%s has no %s: %s", row.name, ", ".join(row.problems), problem)
            break  # one line a matrix is enough
