"""The first training examples, for samplers that measure with data; none of them may be lost for training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from layersample.errors import ConfigError
from layersample.parallel.agreement import num_ranks
from layersample.sampling.calibration import first_of_two_readings, is_indexed


class FirstBatches:
    """Gives the training examples in their own order, in batches; the loader would move the global random state.

    What is read of a stream is put in front of it, so that the loader's next reading begins with it: also where the
    stream can be read once only. With workers, or several processes, it can't be; then it must be readable again.

    Args:
        loader: The Trainer's loader of training data.
        size: Examples of a batch.
        repeat: How often each example comes, one behind the other; a batch is then a multiple of it.
        replays: Whether the loader is only iterated later. One that has an iterator already (Lightning's) wouldn't
            begin with what was read.
    """

    def __init__(self, loader: Any, size: int, *, repeat: int = 1, replays: bool = True) -> None:
        self._loader, self._repeat, self._replays = loader, repeat, replays
        self._size = repeat * max(1, size // repeat)
        self._replay: Replay | None = None

    def __call__(self) -> Iterator[Mapping[str, Any]]:
        """Read them from the first on.

        Raises:
            ConfigError: If the loader has no dataset to read, or what is read of it would never train.
        """
        dataset, collate = getattr(self._loader, "dataset", None), getattr(self._loader, "collate_fn", None)
        if dataset is None or collate is None:
            raise ConfigError(
                f"The sampler measures with the first training examples, so the loader must have a dataset and a "
                f"collate_fn to read them with, but {type(self._loader).__name__} has none. Give the Trainer a "
                "dataset, or choose a sampler or options that need no data."
            )
        rows = (copy.copy(row) for row in self._rows(dataset) for _ in range(self._repeat))
        while batch := list(islice(rows, self._size)):
            yield collate(batch)

    def _rows(self, dataset: Any) -> Iterator[Any]:
        if is_indexed(dataset):
            return (dataset[index] for index in range(len(dataset)))
        if self._replay is not None:  # measured again: training has read on by now
            return map(copy.copy, list(self._replay.read))
        loader = getattr(self._loader, "base_dataloader", self._loader)  # accelerate's holds torch's
        alone = isinstance(loader, DataLoader) and not loader.num_workers and num_ranks() == 1
        if not (self._replays and alone):
            return first_of_two_readings(dataset)
        self._replay = Replay(dataset)
        object.__setattr__(loader, "dataset", self._replay)  # which it forbids to others
        return self._replay.look_ahead()


class Replay(IterableDataset[Any]):
    """A stream whose first examples have been looked at, and come again in the next reading.

    Args:
        stream: The stream. Whatever else is asked of this is asked of it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._rest: Iterator[Any] | None = None
        self.read: list[Any] = []
        """What has been looked at."""

    def look_ahead(self) -> Iterator[Any]:
        """Read from the beginning, without taking anything away."""
        self._rest = iter(self._stream)
        for row in self._rest:
            self.read.append(row)
            yield copy.copy(row)  # who puts a batch together may change its parts

    def __iter__(self) -> Iterator[Any]:
        rest, self._rest = self._rest, None
        return iter(self._stream) if rest is None else chain(list(self.read), rest)

    def __len__(self) -> int:
        return len(self._stream)

    def __getattr__(self, name: str) -> Any:
        if (
            name.startswith("__") or name == "_stream"
        ):  # copying and pickling ask for them before there is a stream
            raise AttributeError(name)
        return getattr(self._stream, name)
