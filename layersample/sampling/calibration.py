"""Calibration batches: what samplers that measure with data are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from layersample.errors import ConfigError

Batches = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
"""Mappings of the model's arguments, in an iterable that can be read more than once, or a function that gives one."""


def reader_of(batches: Batches | None) -> Callable[[], Iterable[Mapping[str, Any]]] | None:
    """A function that gives the calibration batches anew at each call.

    Raises:
        ConfigError: If they can be read once only.
    """
    if batches is None or callable(batches):
        return batches
    if iter(batches) is batches:
        raise ConfigError(
            f"batches must be readable more than once, but got the iterator {type(batches).__name__}, which is empty "
            "after the first time: give a list, a loader, or a function that makes a new iterator."
        )
    return lambda: batches
