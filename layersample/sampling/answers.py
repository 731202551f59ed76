"""What a sampler answers when it is asked: checked here, whatever its code returned."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral

import torch

from layersample.errors import ConfigError, short
from layersample.sampling.faults import SamplerError
from layersample.sampling.full_rank import FullRank
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.sampling.statistics import LayerStatistics

_ROUNDING = 1e-6  # by which a computed chance may lie outside of 0 and 1


def draw(sampler: LayerSampler, context: SamplingContext) -> tuple[int, ...]:
    """Let a sampler choose the layers of a period, and make sure that it chose some that exist.

    Returns:
        Indices, ascending: which layers train is a set, and any iterable of integers will do.

    Raises:
        SamplerError: If they aren't distinct indices of layers, are more than a budget allows, or there are none where
            nothing else trains.
    """
    name, returned = type(sampler).__name__, sampler.sample(context)
    chosen = _indices(returned, context.num_layers)
    if isinstance(chosen, str):
        raise SamplerError(
            f"{name}.sample must return distinct integers from 0 to {context.num_layers - 1}, "
            f"but returned {chosen} in period {context.round}."
        )
    budget = context.budget
    if budget is not None and budget.total(chosen) > budget.limit:
        raise SamplerError(
            f"{name}.sample must keep to the budget of {budget.limit:,} {budget.unit}, but returned {chosen} in "
            f"period {context.round}, which hold {budget.total(chosen):,}."
        )
    if not chosen and not context.allow_empty:
        raise SamplerError(
            f"{name}.sample returned no layer in period {context.round}, and nothing else trains."
        )
    return tuple(sorted(chosen))


def find_inclusion(sampler: LayerSampler, context: SamplingContext) -> Sequence[float] | None:
    """Let a sampler say how likely each layer was to be chosen, if it knows.

    Raises:
        SamplerError: If it says so with other than one number from 0 to 1 a layer.
    """
    inclusion: object = sampler.inclusion_probabilities(context)
    if inclusion is None:
        return None
    unordered = isinstance(inclusion, Mapping | set | frozenset | str | bytes)
    given = list(islice(inclusion, context.num_layers + 1)) if isinstance(inclusion, Iterable) else None
    values = None if given is None or unordered else [float(value) for value in given]
    if (
        values is None
        or len(values) != context.num_layers
        or not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values)
    ):
        shown = short(inclusion) if values is None else values
        raise SamplerError(
            f"{type(sampler).__name__}.inclusion_probabilities must return {context.num_layers} numbers from 0 to 1, "
            f"one a layer in the order of the layers, or None, but returned {shown} in period {context.round}."
        )
    return values


def find_full_rank(sampler: LayerSampler, context: SamplingContext) -> FullRank | None:
    """Ask a sampler which layers get what a projection leaves out.

    Raises:
        SamplerError: If it answers with other than layers that exist and a chance, or ``None``.
    """
    drawn: object = sampler.full_rank(context)
    if drawn is None:
        return None
    layers = _indices(drawn.layers, context.num_layers) if isinstance(drawn, FullRank) else "no FullRank"
    if not isinstance(drawn, FullRank) or isinstance(layers, str) or not 0 < drawn.chance < 1:
        raise SamplerError(
            f"{type(sampler).__name__}.full_rank must return a FullRank with indices from 0 to "
            f"{context.num_layers - 1} and a chance above 0 and below 1, or None, but returned {short(drawn)} in "
            f"period {context.round}."
        )
    return FullRank(frozenset(layers), float(drawn.chance))


def ask_to_end(sampler: LayerSampler, statistics: LayerStatistics, context: SamplingContext) -> bool:
    """Ask a sampler whether the period must end now.

    Raises:
        ConfigError: If it answers neither yes nor no.
    """
    wanted: object = sampler.wants_new_period(statistics, context)
    if isinstance(wanted, bool) or hasattr(wanted, "dtype"):  # NumPy and torch have truth values of their own
        return bool(wanted)
    raise ConfigError(f"wants_new_period must return True or False, but returned {wanted!r}.")


def _indices(returned: object, num_layers: int) -> list[int] | str:
    """The layers that an answer names, each once, as plain integers; else the answer, to be shown."""
    if isinstance(returned, Mapping | str | bytes | bytearray) or not isinstance(returned, Iterable):
        return short(returned)
    given = list(islice(returned, num_layers + 1))  # one that never ends is too long
    whole = [operator.index(value) for value in given if _is_integer(value)]
    valid = len(whole) == len(given) == len(set(whole)) and all(0 <= index < num_layers for index in whole)
    return whole if valid else str(given)


def _is_integer(value: object) -> bool:
    """Whether a value is an integer, of NumPy's or torch's too; a truth value isn't."""
    if isinstance(value, torch.Tensor):
        kind = value.dtype
        return not (value.dim() or kind.is_floating_point or kind.is_complex or kind == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool)
