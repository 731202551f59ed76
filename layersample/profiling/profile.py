"""Profile a model: what its weights say of each layer, and how often each sampler would train it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import nn

from layersample.choices import Granularity
from layersample.errors import ConfigError, some
from layersample.layers.costs import layer_costs
from layersample.layers.find import ModelLayers, find_layers
from layersample.layers.rules import Units
from layersample.layers.unchanged import unchanged
from layersample.layers.units import split_layers
from layersample.metrics import layer_metrics, lora_norms, outlier_ratios, weight_matrices
from layersample.metrics.model import estimate_seconds
from layersample.registry import create_sampler
from layersample.sampling.calibration import Batches
from layersample.sampling.pace import PROGRESS
from layersample.sampling.sampler import LayerSampler, Measurement, SamplingContext
from layersample.sampling.statistics import LayerStatistics
from layersample.sampling.weighted import MeasuredSampler, WeightedSampler
from layersample.unwrapping import unwrap

SamplerChoice = str | tuple[str, Mapping[str, Any]]
Progress = Callable[[str, int, int | None], None]
_SPECTRAL = ("alpha", "hill", "stable_rank")
_THRESHOLD = 5.0  # M of the outliers, where no sampler counts them


@dataclass(frozen=True)
class LayerProfile:
    """What was measured on one layer, or part of one; ``None`` where there is no value, for a reason in the notes.

    Args:
        name: Its path in the model.
        num_parameters: Its parameters, a tied weight once.
        alpha: Mean power-law exponent α of its matrices.
        hill: Mean PL_Alpha_Hill of its matrices.
        stable_rank: Mean stable rank of its matrices.
        outlier_percent: Percent of its weights whose |W|·‖X‖₂ is above the threshold times the layer's mean.
        lora_ratio: ‖s·BA‖_F / ‖W‖_F of the adapter.
        probabilities: By sampler, the layer's share of the draws.
        inclusion: By sampler, the chance that the layer trains in the first period.
        scores: By sampler that measures the model, the layer's score.
    """

    name: str
    num_parameters: int
    alpha: float | None
    hill: float | None
    stable_rank: float | None
    outlier_percent: float | None
    lora_ratio: float | None
    probabilities: dict[str, float | None]
    inclusion: dict[str, float | None]
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Profile:
    """What was measured on a model.

    Args:
        layers: One entry a layer, from the input to the output.
        samplers: The samplers' names, with their options.
        num_active: Layers that train at a time.
        threshold: M of the outliers.
        notes: Why values are missing, and what a sampler warned of.
        granularity: What :attr:`layers` are: whole layers, or parts of them.
    """

    layers: tuple[LayerProfile, ...]
    samplers: tuple[str, ...]
    num_active: int
    threshold: float
    notes: tuple[str, ...]
    granularity: Granularity = "layer"

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat row a layer, of JSON types, with the same keys in all of them.

        A sampler's columns are ``probability:SAMPLER``, ``inclusion:SAMPLER`` and, where it measures the model,
        ``score:SAMPLER``.
        """
        return [
            {
                "index": index,
                "layer": layer.name,
                "parameters": layer.num_parameters,
                **{metric: getattr(layer, metric) for metric in _SPECTRAL},
                "outlier_percent": layer.outlier_percent,
                "lora_ratio": layer.lora_ratio,
                **{f"probability:{name}": value for name, value in layer.probabilities.items()},
                **{f"inclusion:{name}": value for name, value in layer.inclusion.items()},
                **{f"score:{name}": value for name, value in layer.scores.items()},
            }
            for index, layer in enumerate(self.layers)
        ]


def profile(
    model: nn.Module,
    *,
    samplers: Sequence[SamplerChoice] = (),
    num_active: int = 2,
    granularity: Granularity = "layer",
    batches: Batches | None = None,
    threshold: float | None = None,
    adapter: str | Path | nn.Module | None = None,
    layers: str | Sequence[str | nn.Module] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Measure each layer of a model, and what each sampler would make of it. The model isn't changed.

    A value that can't be measured is ``None`` with the reason in the notes; only wrong arguments raise.

    Args:
        model: Any model that ``find_layers`` works on.
        samplers: Names of samplers, or pairs of a name and its options. They see the model as at the start
            of a run, with seed 0.
        num_active: Layers that train at a time (γ), between 1 and the number of layers.
        granularity: What is measured and sampled as one, as :class:`layersample.LayerScheduler` has it: ``"layer"``,
            ``"block"``, ``"module"`` or ``"tensor"``. All that is said of layers then holds for these.
        batches: Calibration batches, for outliers and for samplers that measure with data: mappings of the
            model's arguments, in an iterable that can be read more than once, or a function that gives one.
        threshold: M of the outliers, above 0; by default that of the first of the samplers that counts them, or 5.
        adapter: Folder of a LoRA adapter of this model, or a live PeftModel.
        layers: Where the layers are, if they can't be found: see ``find_layers``.
        cache: Whether to keep the spectral metrics on disk and take them from there. A sampler decides for
            itself.
        progress: Called with (what is measured, how much of it is done, all of it or ``None``).

    Raises:
        ConfigError: If no layers are found, a sampler or an option of one is unknown, a number is out of
            bounds, or the adapter can't be read or belongs to another model.

    References:
        weightwatcher 0.7.7 (α); TempBalance, arXiv 2312.00359 (Hill); OWL, arXiv 2310.05175 (outliers);
        LISA, arXiv 2403.17919 (LoRA norms).
    """
    model = unwrap(model)
    if granularity not in get_args(Granularity):
        raise ConfigError(
            f"granularity must be one of {', '.join(get_args(Granularity))}, but got {granularity!r}."
        )
    found = find_layers(model, layers)
    found = replace(found, layers=split_layers(model, found, granularity))
    count = len(found.layers)
    if not 1 <= num_active <= count:
        raise ConfigError(
            f"num_active must be between 1 and the {count} {granularity}s, but got num_active={num_active}."
        )
    if threshold is not None and not (math.isfinite(threshold) and threshold > 0):
        raise ConfigError(f"threshold must be finite and above 0, but got {threshold}.")
    # What the user may have got wrong comes first, what takes long last.
    made = _create_all(samplers)
    report = progress or _ignore
    notes: list[str] = []
    lora = _lora_ratios(model, found, adapter, notes)
    spectra = _spectra(model, found, cache, report, notes)
    chances = _ask_all(made, _measurement(model, found, num_active, batches), report, notes)
    if threshold is None:  # once they have measured: an M that serves may not be the one that was asked for
        counted = (sampler.outlier_threshold for sampler in made.values())
        threshold = next((m for m in counted if m is not None), _THRESHOLD)
    outliers = _outliers(model, found, batches, threshold, report, notes)
    for label, sampler in made.items():
        if sampler.outlier_threshold not in (None, threshold):
            notes.append(
                f"{label} counts outliers above {sampler.outlier_threshold:g} times the layer's mean, the column "
                f"those above {threshold:g} times."
            )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    profiles = tuple(
        LayerProfile(
            name=layer.name,
            num_parameters=sum(sizes[name] for name in layer.parameters),
            **{metric: values.get(layer.name) for metric, values in spectra.items()},
            outlier_percent=outliers.get(layer.name),
            lora_ratio=lora.get(layer.name),
            probabilities={name: chance[0][index] for name, chance in chances.items()},
            inclusion={name: chance[1][index] for name, chance in chances.items()},
            scores={
                name: sampler.scores.get(layer.name)
                for name, sampler in made.items()
                if isinstance(sampler, MeasuredSampler)
            },
        )
        for index, layer in enumerate(found.layers)
    )
    return Profile(profiles, tuple(made), num_active, threshold, tuple(dict.fromkeys(notes)), granularity)


def _create_all(choices: Sequence[SamplerChoice]) -> dict[str, LayerSampler]:
    """The samplers by a label that tells two of one name apart."""
    made: dict[str, LayerSampler] = {}
    for choice in choices:
        name, options = (choice, {}) if isinstance(choice, str) else choice
        label = ",".join(f"{key}={value}" for key, value in options.items())
        made[f"{name}:{label}" if label else name] = create_sampler(name, options)
    return made


def _lora_ratios(
    model: nn.Module, layers: ModelLayers, adapter: str | Path | nn.Module | None, notes: list[str]
) -> dict[str, float]:
    if adapter is None:
        return {}
    norms = lora_norms(adapter, model, layers)
    ratios = {layer.name: norms[layer.name].ratio for layer in layers.layers}
    bad = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
    if bad:
        notes.append(f"No LoRA ratio of {some(bad)}: the adapter's weights or the model's aren't finite.")
    return {name: ratio for name, ratio in ratios.items() if name not in bad}


def _spectra(
    model: nn.Module, layers: ModelLayers, cache: bool, report: Progress, notes: list[str]
) -> dict[str, dict[str, float]]:
    """By metric, the mean over each layer's matrices; a layer without any that it is defined for is left out."""
    try:
        count, seconds = estimate_seconds(model, layers)
        PROGRESS.info(
            "Spectra of %d matrices: about %.0f s here, less for those that are cached.",
            count,
            max(1, seconds),
        )
        with _quiet("layersample.metrics.model"):  # the notes below say the same
            measured = layer_metrics(
                model, layers, _SPECTRAL, cache=cache, progress=lambda n, total: report("spectra", n, total)
            )
    except ConfigError as error:
        notes.append(f"No spectra: {error}")
        return {metric: {} for metric in _SPECTRAL}
    lacking: dict[tuple[str, str], list[str]] = {}
    means: dict[str, dict[str, float]] = {}
    for metric in _SPECTRAL:
        values: dict[str, list[float]] = {}
        for matrix in measured.matrices:
            if metric in matrix.values:
                values.setdefault(matrix.layer, []).append(matrix.values[metric])
            else:
                lacking.setdefault((metric, matrix.problems[metric]), []).append(matrix.name)
        means[metric] = {layer: sum(found) / len(found) for layer, found in values.items()}
    notes += [f"No {metric} of {some(names)}: {reason}" for (metric, reason), names in lacking.items()]
    seen = {matrix.layer for matrix in measured.matrices}
    if without := [layer.name for layer in layers.layers if layer.name not in seen]:
        notes.append(f"No spectra of {some(without)}: there is no weight matrix in it.")
    return means


def _outliers(
    model: nn.Module,
    layers: ModelLayers,
    batches: Batches | None,
    threshold: float,
    report: Progress,
    notes: list[str],
) -> dict[str, float]:
    if batches is None:
        notes.append("No outliers: they need calibration data, and none was given.")
        return {}
    given = batches() if callable(batches) else batches
    owners = {matrix.layer for matrix in weight_matrices(model, layers)}
    if without := [layer.name for layer in layers.layers if owners and layer.name not in owners]:
        notes.append(f"No outliers of {some(without)}: there is no weight matrix in it.")
        layers = replace(layers, layers=tuple(layer for layer in layers.layers if layer.name in owners))
    try:
        ratios = outlier_ratios(model, _counted(given, report), layers, (threshold,))
    except Exception as error:  # whatever the model's forward says to these batches
        notes.append(f"No outliers: {_describe(error)}")
        return {}
    return {name: by_threshold[threshold] for name, by_threshold in ratios.items()}


def _counted(batches: Iterable[Any], report: Progress) -> Iterator[Any]:
    total = len(batches) if isinstance(batches, Sequence) else None
    for done, batch in enumerate(batches, 1):
        yield batch
        report("outliers", done, total)  # only now has the model run on it


def _measurement(
    model: nn.Module, layers: ModelLayers, num_active: int, batches: Batches | None
) -> Measurement:
    names = tuple(layer.name for layer in layers.layers)
    give = batches if batches is None or callable(batches) else lambda: batches
    return Measurement(model, layers, names, num_active, changed=names, batches=give)


_Chances = tuple[Sequence[float | None], Sequence[float | None]]


def _ask_all(
    samplers: Mapping[str, LayerSampler], measurement: Measurement, report: Progress, notes: list[str]
) -> dict[str, _Chances]:
    """By sampler, the probability and the inclusion probability of each layer."""
    count, layers = len(measurement.layers), measurement.model_layers
    # The default rules of a run: everything outside of the layers trains. A frozen model may be profiled too.
    trainable = {name: parameter.requires_grad for name, parameter in measurement.model.named_parameters()}
    units = Units(layers.layers, tuple(layers.groups.values()), trainable)
    context = SamplingContext(
        measurement.layers,
        measurement.num_active,
        statistics=LayerStatistics((0,) * count, (None,) * count),
        allow_empty=any(group.parameters for group in layers.groups.values()),
        costs=layer_costs(measurement.model, units),
    )
    chances: dict[str, _Chances] = {}
    for done, (label, sampler) in enumerate(samplers.items(), 1):
        try:
            # What it warns of, another threshold that it chose say, belongs beside its figures.
            told = replace(measurement, warn=partial(_note, label, notes))
            with unchanged(measurement.model, only_after_errors=True), _quiet("layersample.metrics.model"):
                sampler.measure(told)
                chances[label] = _ask(sampler, context)
        except Exception as error:  # a sampler may be a user's own and raise anything
            notes.append(f"No probabilities of {label}: {_describe(error)}")
            chances[label] = [None] * count, [None] * count
        report("samplers", done, len(samplers))
    return chances


def _note(label: str, notes: list[str], text: str) -> None:
    notes.append(f"{label}: {text}")


def _ask(sampler: LayerSampler, context: SamplingContext) -> _Chances:
    inclusion = sampler.inclusion_probabilities(context)
    if isinstance(sampler, WeightedSampler):
        probabilities: Sequence[float] = sampler.probabilities(context)
    elif inclusion is None:
        raise ValueError(f"{type(sampler).__name__} doesn't say how likely it is to draw each layer.")
    else:  # no single draw to speak of: the layer's share of the set
        probabilities = [chance / sum(inclusion) for chance in inclusion]
    inclusion = [None] * context.num_layers if inclusion is None else inclusion  # type: ignore[list-item]
    for what, values in (("probabilities", probabilities), ("inclusion probabilities", inclusion)):
        if len(values) != context.num_layers or any(v is not None and not math.isfinite(v) for v in values):
            raise ValueError(f"{what} must be {context.num_layers} finite numbers, but are {list(values)}.")
    return probabilities, inclusion


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drop what one logger says."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _describe(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _ignore(what: str, done: int, total: int | None) -> None:
    pass
