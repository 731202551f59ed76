"""Samplers measure with the first training examples, which must train all the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import IterableDataset as HubStream
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from layersample import ConfigError, LayerSamplingCallback
from layersample.integrations.first_batches import FirstBatches
from tests.helpers import make_batch, make_llama

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
    measured = list(FirstBatches(loader, 2)())
    trained = list(loader)
    assert [len(batch) for batch in measured] == [2, 2, 1]
    assert [str(batch) for batch in measured] == [str(batch) for batch in trained]


ONCE: dict[str, Any] = {
    "an iterator inside": lambda: Stream(iter(ROWS)),
    "its own iterator": lambda: Itself(iter(ROWS)),
    "one row": lambda: Stream(row for row in ROWS[:1]),
    "another each time": lambda: Anew(),
}


class Anew(IterableDataset[Any]):
    """Other rows in each reading."""

    def __init__(self) -> None:
        self.readings = 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        return iter([{"x": 10 * self.readings + i} for i in range(5)])


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("looked_at", [1, 2, 9])
def test_what_is_measured_of_a_stream_trains_all_the_same(kind: str, looked_at: int) -> None:
    untouched = [str(batch) for batch in load(ONCE[kind]())]
    loader = load(ONCE[kind]())
    batches = FirstBatches(loader, 2)
    measured = [str(batch) for batch in islice(batches(), looked_at)]
    assert measured == untouched[:looked_at]
    again = iter(loader)
    trained = [str(next(again))]
    later = [str(batch) for batch in islice(batches(), looked_at)]  # measured again, while it trains
    assert later == measured
    trained += [str(batch) for batch in again]
    assert trained == untouched


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("workers", [0, 1])
def test_elsewhere_a_stream_must_be_readable_again(kind: str, workers: int) -> None:
    """With workers, and where the loader's iterator is there already."""
    loader = DataLoader(ONCE[kind](), batch_size=2, collate_fn=list, num_workers=workers)
    with pytest.raises(ConfigError, match="must be the same each time it is read, .* would never train"):
        next(FirstBatches(loader, 2, replays=bool(workers))())


def test_a_collator_that_takes_its_rows_apart_leaves_them_whole_for_training() -> None:
    def collate(rows: Any) -> Any:
        return [row.pop("x") for row in rows]

    loader: Any = DataLoader(
        Stream(dict(row) for row in [{"x": 1}, {"x": 2}, {"x": 3}]), batch_size=2, collate_fn=collate
    )
    measured: list[Any] = list(FirstBatches(loader, 2)())
    assert measured == [[1, 2], [3]]
    assert list(loader) == [[1, 2], [3]]


@pytest.mark.parametrize("sampler", ["lisa", "owlore"])
def test_the_trainer_trains_on_all_of_a_stream(sampler: str, tmp_path: Path) -> None:
    """With a sampler that measures as with one that doesn't."""
    seen: list[int] = []

    class Notes(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            seen.append(int(inputs["input_ids"].sum()))
            return super().training_step(model, inputs, *args)

    batches = [make_batch(i, 1) for i in range(8)]
    rows = iter([{key: value[0] for key, value in batch.items()} for batch in batches])
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        dataloader_pin_memory=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Notes(model=make_llama(), args=args, train_dataset=Stream(rows))
    options = {"metric": "outlier", "num_batches": 2} if sampler == "owlore" else {}
    LayerSamplingCallback(sampler, period=2, sampler_options=options).attach(trainer)
    trainer.train()
    sums = [int(batch["input_ids"].sum()) for batch in batches]
    assert seen == [one + other for one, other in zip(sums[::2], sums[1::2], strict=True)]


def test_an_empty_dataset_has_no_batches() -> None:
    assert list(FirstBatches(load(Stream([])), 2)()) == []


def test_a_loader_without_a_dataset_is_refused() -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ConfigError, match="must have a dataset and a collate_fn .* but Loader has none"):
        next(FirstBatches(Loader(), 2)())
