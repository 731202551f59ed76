"""Data that is read while it trains, for files larger than memory: checked, split and tokenized as it comes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from layersample.errors import ConfigError
from layersample.training.builtin_data import Row
from layersample.training.data import (
    Recognized,
    convert_rows,
    load_held_out,
    not_enough_problems,
    open_source,
    problem_of,
    to_dataset,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from layersample.training.trainer import CheckedTrainer

_WINDOW = 32  # examples from the start of the data in which each held-out problem is looked for
_CHUNK = 256  # examples that are tokenized at a time
_WINDOW_OF_ORDER = 2048  # tokenized examples of which the next one is drawn


class StreamCount:
    """How many examples of a stream have been tokenized, and what was lost of them; of the first pass over them.

    It lies in memory that the processes of a data loader share with the one that made them.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64)
        self._counts.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def read(self) -> int:
        """Examples."""
        return int(self._counts[0])

    @property
    def cut(self) -> int:
        """Those that were longer than ``max_length``."""
        return int(self._counts[1])

    @property
    def lost_answers(self) -> int:
        """Answers that aren't learned, because the chat template renders them differently once others follow."""
        return int(self._counts[2])

    def come_to(self, read: int, cut: int, lost_answers: int) -> None:
        """Take over counts from the start of the data on; those of a reader that is behind another change nothing."""
        if read > self.read:
            self._counts.copy_(torch.tensor([read, cut, lost_answers]))


@dataclass(frozen=True)
class StreamedRows:
    """Training data that is read anew each time, without what was held out.

    Args:
        source: As :func:`load_data` takes it.
        columns: The name in the data of each column that formats know.
        keep: Names that the chat template reads.
        held_out: Problems that must not train.
        description: What was recognized, in a sentence.
        count: How many have been tokenized, and cut.
    """

    source: str
    columns: Mapping[str, str]
    keep: Collection[str] = ()
    held_out: frozenset[str] = frozenset()
    description: str = field(default="", compare=False)
    count: StreamCount = field(default_factory=StreamCount, compare=False)

    def __iter__(self) -> Iterator[Row]:
        """All examples once, checked as they are read.

        Raises:
            ConfigError: As :func:`load_data`, when it comes to the row.
        """
        return (row for row, _ in self.recognized() if problem_of(row) not in self.held_out)

    def recognized(self) -> Iterator[tuple[Row, Recognized]]:
        """All examples with what the data was taken for, those that are held out too."""
        return convert_rows(open_source(self.source, self.columns, stream=True), self.columns, self.keep)

    def chunks(self) -> Iterator[Dataset]:
        """The examples once, some at a time."""
        rows = iter(self)
        while chunk := list(islice(rows, _CHUNK)):
            yield to_dataset(chunk)


def stream_split(
    source: str,
    eval_source: str | None,
    *,
    eval_size: int,
    seed: int,
    columns: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
) -> tuple[StreamedRows, Dataset]:
    """Data to read while it trains, and held-out data.

    Args:
        source: As :func:`load_data` takes it.
        eval_source: The same for held-out data, which is read at once; ``None`` holds out problems of ``source``:
            those of its first examples (32 for each held-out one) with the smallest hash of seed and prompt.
        eval_size: Held-out problems, at most.
        seed: Seed of the choice of held-out problems.
        columns: As :func:`load_data` takes them, of both.
        keep: As :func:`load_data` takes it.

    Raises:
        ConfigError: If there is nothing to train on or to hold out, or the first examples are malformed.
    """
    rows = StreamedRows(source, columns or {}, keep)
    first = list(islice(rows.recognized(), _WINDOW * eval_size))
    if eval_source is not None:
        held_out = load_held_out(eval_source, eval_size, columns, keep)
    else:
        by_hash = {_hash(seed, problem_of(row)): row for row, _ in reversed(first)}
        if len(by_hash) < 2:
            raise not_enough_problems(source, len(by_hash))
        chosen = sorted(by_hash)[: min(eval_size, len(by_hash) // 2)]
        held_out = to_dataset([by_hash[each] for each in chosen])
    problems = frozenset(problem_of(row) for row in held_out)
    kind = first[0][1]
    description = f"Recognized as {kind.format.sentence}: read while it trains.{kind.rest}"
    return StreamedRows(source, rows.columns, keep, problems, description), held_out


def tokenize_stream(
    rows: StreamedRows,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    train_on: Literal["answers", "all"],
    seed: int,
) -> IterableDataset:
    """Tokens and labels of streamed data, without an end: behind the last example comes the first one.

    The order is drawn from a window of some thousand examples, and the same each time; so a resumed run goes on where
    it was, by reading what it has read before.

    Args:
        rows: The data.
        tokenizer: The model's.
        arguments: The Trainer's; what is longer than ``max_length`` is cut.
        train_on: What is learned.
        seed: Seed of the order.
    """
    from datasets import IterableDataset

    def examples() -> Iterator[dict[str, Any]]:
        from layersample.training.trainer import CheckedTrainer

        for number in count():
            empty = True
            for row in _shuffled(tokens(CheckedTrainer, first=not number), random.Random(f"{seed}:{number}")):
                empty = False
                yield row
            if empty:
                raise ConfigError(
                    f"{rows.source}: no training example is left, because all of them are in the held-out data, or "
                    f"the prompts alone fill max_length={arguments.max_length} tokens."
                )

    def tokens(trainer: type[CheckedTrainer], *, first: bool) -> Iterator[dict[str, Any]]:
        read = cut = lost = 0
        for chunk in rows.chunks():
            ready, cut_now, lost_now = trainer.prepare_chunk(chunk, tokenizer, train_on, arguments)
            read, cut, lost = read + len(chunk), cut + cut_now, lost + lost_now
            if first:
                rows.count.come_to(read, cut, lost)
            for row in ready:
                yield {"input_ids": row["input_ids"], "labels": row["labels"]}

    return IterableDataset.from_generator(examples)


def _shuffled(rows: Iterator[dict[str, Any]], generator: random.Random) -> Iterator[dict[str, Any]]:
    """Rows in another order: each is drawn from the next ones that a window holds, and all come once."""
    window = list(islice(rows, _WINDOW_OF_ORDER))
    for row in rows:
        place = generator.randrange(len(window))
        yield window[place]
        window[place] = row
    generator.shuffle(window)
    yield from window


def _hash(seed: int, problem: str) -> str:
    return hashlib.sha256(f"{seed}:{problem}".encode()).hexdigest()
