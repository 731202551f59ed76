"""What samplers have measured on whole models, for the time when their weights are cut into shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from layersample.sampling.sampler import LayerSampler

# By model, which sharding leaves the same object, and by class of sampler.
_measured: WeakKeyDictionary[nn.Module, dict[type[LayerSampler], Mapping[str, Any]]] = WeakKeyDictionary()


def remember(model: nn.Module, sampler: LayerSampler, state: Mapping[str, Any]) -> None:
    """Keep what a sampler has measured, for one of the same class that is given the model in shards.

    Args:
        model: The model, still whole.
        sampler: The sampler.
        state: Its ``state_dict()`` after the measurement.
    """
    _measured.setdefault(model, {})[type(sampler)] = state


def recall(model: nn.Module, sampler: LayerSampler) -> bool:
    """Give a sampler what one of its class measured while the model was whole; whether there was anything."""
    state = _measured.get(model, {}).get(type(sampler))
    if state is None:
        return False
    sampler.load_state_dict(state)
    return True
