"""What samplers have measured on whole models, for the time when their weights are cut into shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from layersample.sampling.sampler import LayerSampler

_Measured = tuple[Mapping[str, Any], Mapping[str, Any]]  # the sampler's options, and its state

# By model, which sharding leaves the same object, and by class of sampler.
_measured: WeakKeyDictionary[nn.Module, dict[type[LayerSampler], _Measured]] = WeakKeyDictionary()


def remember(model: nn.Module, sampler: LayerSampler, state: Mapping[str, Any]) -> None:
    """Keep what a sampler has measured, for one like it that is given the model in shards.

    Args:
        model: The model, still whole.
        sampler: The sampler.
        state: Its ``state_dict()`` after the measurement.
    """
    _measured.setdefault(model, {})[type(sampler)] = _options(sampler), state


def recall(model: nn.Module, sampler: LayerSampler) -> bool:
    """Give a sampler what one like it measured while the model was whole; whether there was anything."""
    options, state = _measured.get(model, {}).get(type(sampler), (None, {}))
    if options != _options(sampler):  # other options measure something else
        return False
    sampler.load_state_dict(state)
    return True


def _options(sampler: LayerSampler) -> dict[str, Any]:
    """Its options, where they are the fields of a dataclass; others aren't known."""
    if not is_dataclass(sampler):
        return {}
    return {field.name: getattr(sampler, field.name) for field in fields(sampler) if field.init}
