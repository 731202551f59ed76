"""Samplers measure with the first training examples, which must train all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as HubStream
from torch.utils.data import DataLoader, IterableDataset

from layersample import ConfigError
from layersample.integrations.first_batches import first_batches

ROWS: list[dict[str, Any]] = [
    {"x": torch.tensor([float(i), float("nan")]), "y": np.arange(i + 1)} for i in range(5)
]


class Stream(IterableDataset[Any]):
    """Gives rows from where it is told."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


class Itself(Stream):
    """Is its own iterator."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.source)


def load(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=2, collate_fn=list)


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        Stream(ROWS),
        Dataset.from_list([{"x": i} for i in range(5)]),
        Dataset.from_list([{"x": i} for i in range(5)]).to_iterable_dataset(),
        HubStream.from_generator(lambda: ({"x": i} for i in range(5))),
    ],
    ids=["list", "stream of a list", "Dataset", "IterableDataset", "from a generator"],
)
def test_what_is_measured_is_read_again_for_training(dataset: Any) -> None:
    loader = load(dataset)
    measured = list(first_batches(loader, 2))
    trained = list(loader)
    assert [len(batch) for batch in measured] == [2, 2, 1]
    assert [str(batch) for batch in measured] == [str(batch) for batch in trained]


@pytest.mark.parametrize(
    "make",
    [lambda: Stream(iter(ROWS)), lambda: Itself(iter(ROWS)), lambda: Stream(row for row in ROWS[:1])],
    ids=["an iterator inside", "its own iterator", "one row"],
)
def test_a_stream_that_can_be_read_once_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="must be the same each time it is read, .* would never train"):
        next(first_batches(load(make()), 2))


def test_an_empty_dataset_has_no_batches() -> None:
    assert list(first_batches(load(Stream([])), 2)) == []


def test_a_loader_without_a_dataset_is_refused() -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ConfigError, match="must have a dataset and a collate_fn .* but Loader has none"):
        next(first_batches(Loader(), 2))
