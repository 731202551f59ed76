"""The first training examples, for samplers that measure with data; none of them may be lost for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor

from layersample.errors import ConfigError

_INSTEAD = (
    "Give the Trainer a dataset that can be read again (a datasets.Dataset or datasets.IterableDataset), or choose a "
    "sampler or options that need no data."
)


def first_batches(loader: Any, size: int) -> Iterator[Mapping[str, Any]]:
    """The training examples in their own order, in batches; the loader would move the global random state.

    Args:
        loader: The Trainer's loader of training data.
        size: Examples of a batch.

    Raises:
        ConfigError: If the loader has no dataset to read, or one that can be read once only: what a measurement reads
            of it would never train.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None:
        raise ConfigError(
            f"The sampler measures with the first training examples, so the loader must have a dataset and a "
            f"collate_fn to read them with, but {type(loader).__name__} has none. {_INSTEAD}"
        )
    rows = _rows(dataset)
    while batch := list(islice(rows, size)):
        yield collate(batch)


def _rows(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[index] for index in range(len(dataset)))
    rows = iter(dataset)
    if rows is dataset:
        raise ConfigError(_once(dataset))
    first = list(islice(rows, 1))
    # A second reading must begin where the first did, or training would go on behind what was measured.
    if first and not _is_same(first, list(islice(iter(dataset), 1))):
        raise ConfigError(_once(dataset))
    return chain(first, rows)


def _once(dataset: Any) -> str:
    return (
        f"The sampler measures with the first training examples, so the training data must be the same each time it "
        f"is read, but a second reading of {type(dataset).__name__} doesn't begin with the first example: what was "
        f"measured would never train. {_INSTEAD}"
    )


def _is_same(one: object, other: object) -> bool:
    """Whether two examples are equal, tensors and arrays in them too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str | bytes):
        return len(one) == len(other) and all(map(_is_same, one, other))
    equal = one == other
    return bool(getattr(equal, "all", lambda: equal)())
