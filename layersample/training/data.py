"""Training data: built in, from files, or from the hub; checked row by row, and split by problem."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layersample.errors import NEEDS_TRAIN, ConfigError, unknown
from layersample.training.builtin_data import BUILTIN, Row
from layersample.training.formats import BESIDE, Format, convert, recognize, rename
from layersample.training.readers import READERS, is_file_source, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


def load_split(
    source: str,
    eval_source: str | None,
    *,
    eval_size: int,
    seed: int,
    columns: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
) -> tuple[Dataset, Dataset]:
    """Load the data and hold a part of it out.

    Args:
        source: As :func:`load_data` takes it.
        eval_source: The same for held-out data; ``None`` holds out a part of ``source``.
        eval_size: Held-out problems, at most.
        seed: Seed of the choice of held-out problems.
        columns: As :func:`load_data` takes them, of both.
        keep: As :func:`load_data` takes it.

    Returns:
        The training data and the held-out data. No held-out problem (equal prompt) is in the training data.

    Raises:
        ConfigError: If a source is missing, empty or malformed; it names the line.
    """
    data = load_data(source, columns, keep)
    keys = [problem_of(row) for row in data]
    if eval_source is not None:
        held_out = load_held_out(eval_source, eval_size, columns, keep)
        test = {problem_of(row) for row in held_out}
    else:
        problems = sorted(set(keys))
        if len(problems) < 2:
            raise not_enough_problems(source, len(problems))
        # Half at most, so that a small file still trains on something.
        test = set(random.Random(seed).sample(problems, min(eval_size, len(problems) // 2)))
        held_out = data.select(
            sorted({key: i for i, key in reversed([*enumerate(keys)]) if key in test}.values())
        )
    train = data.select([i for i, key in enumerate(keys) if key not in test])
    if not len(train):
        raise ConfigError(
            f"{source}: no training example is left, because all of them are in the held-out data."
        )
    return train, held_out


def load_held_out(
    source: str, size: int, columns: Mapping[str, str] | None, keep: Collection[str]
) -> Dataset:
    """The first examples of held-out data of its own.

    Args:
        source: As :func:`load_data` takes it.
        size: Examples, at most.
        columns: As :func:`load_data` takes them.
        keep: As :func:`load_data` takes it.
    """
    held_out = load_data(source, columns, keep)
    return held_out.select(range(min(size, len(held_out))))


def load_data(source: str, columns: Mapping[str, str] | None = None, keep: Collection[str] = ()) -> Dataset:
    """Load one source, in TRL's format whatever its own is.

    Args:
        source: A built-in name; a JSONL, JSON, CSV, Parquet or text file, compressed by gzip or not; several of them
            with commas; a folder of them; or a hub id.
        columns: The name in the data of each column that formats know.
        keep: Names that the model's chat template reads; columns of these names are given to it.

    Returns:
        The data; its ``info.description`` says in a sentence what was recognized.

    Raises:
        ConfigError: As :func:`load_split`; or if examples are of different formats.
    """
    columns = columns or {}
    found = list(convert_rows(open_source(source, columns), columns, keep))
    data = to_dataset([dict(row) for row, _ in found])
    kind = found[0][1]
    data.info.description = f"Recognized as {kind.format.sentence}: {len(found)} examples.{kind.rest}"
    return data


@dataclass(frozen=True)
class Recognized:
    """What data was taken for.

    Args:
        format: Its format.
        unused: Columns of the first row that nothing reads.
    """

    format: Format
    unused: Sequence[str]

    @property
    def rest(self) -> str:
        """A sentence on what isn't read, with a space in front of it; empty where all is."""
        return f" Not used: {', '.join(map(repr, self.unused))}." if self.unused else ""


def open_source(
    source: str, columns: Mapping[str, str], *, stream: bool = False
) -> Iterator[tuple[str, Any]]:
    """The rows of a source as they are, each with its place for messages.

    Args:
        source: As :func:`load_data` takes it.
        columns: As :func:`load_data` takes them.
        stream: Whether data of the hub is read as it is needed.

    Raises:
        ConfigError: If there is no such source.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"Training {NEEDS_TRAIN}") from error
    if source in BUILTIN:
        if columns:
            raise ConfigError(f"columns are for data of your own; {source!r} has the right ones.")
        return ((f"{source}, example {i}", row) for i, row in enumerate(BUILTIN[source](), 1))
    if is_file_source(source):
        return read_rows(source)
    if source.count("/") != 1:
        raise ConfigError(
            f"{unknown('data', source, BUILTIN)} A file ({', '.join(READERS)}), a folder of files or a hub id "
            "(organisation/name) will do too."
        )
    try:
        data = load_dataset(source, split="train", **({"streaming": True} if stream else {}))
    except Exception as error:  # whatever the hub, the network or the data set's format says
        raise ConfigError(f"{source}: could not be loaded from the hub: {error}") from error
    return ((f"{source}, example {i}", row) for i, row in enumerate(data, 1))


def convert_rows(
    rows: Iterable[tuple[str, Any]], columns: Mapping[str, str], keep: Collection[str] = ()
) -> Iterator[tuple[Row, Recognized]]:
    """Rows in TRL's format, each with what the data was taken for; checked one after another.

    Args:
        rows: As they were read, each with its place for messages.
        columns: As :func:`load_data` takes them.
        keep: As :func:`load_data` takes it.

    Raises:
        ConfigError: If a row can't be used, or isn't of the same format as the first one; it names the row.
    """
    first: tuple[Row, Recognized] | None = None
    for place, raw in rows:
        renamed = rename(raw, columns, place)
        kind = recognize(renamed, place)
        row = convert(renamed, kind, place, keep)
        if first is None:
            first = row, Recognized(kind, kind.unused(renamed, keep))
        if kind is not first[1].format:
            raise ConfigError(
                f"{place}: all examples must have the same format as the first one, {first[1].format.sentence}, but "
                f"this one is {kind.sentence}."
            )
        if isinstance(first[0].get("prompt"), str) != isinstance(row.get("prompt"), str):
            raise ConfigError(f"{place}: all examples must be text or all messages, as the first one is.")
        yield row, first[1]


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A data set that gives each example back as it was.

    Arrow would give all messages the keys of all others, filled with ``None``, which templates take for values; so
    messages with more than a role and text are kept as JSON.
    """
    from datasets import Dataset

    beside = [name for name in BESIDE if any(name in row for row in rows)]
    names = [*(name for name in rows[0] if name not in BESIDE), *beside]
    complete = [
        {name: row.get(name, {} if name == "chat_template_kwargs" else None) for name in names}
        for row in rows
    ]
    for row in complete:
        if isinstance(kwargs := row.get("chat_template_kwargs"), str):
            row["chat_template_kwargs"] = json.loads(kwargs)
    lists = [name for name in names if isinstance(complete[0][name], list)]
    messages = [message for row in complete for name in lists for message in row[name] or []]
    rich = any(set(message) != {"role", "content"} for message in messages)
    if not rich and "chat_template_kwargs" not in names:
        return Dataset.from_list(complete)
    return Dataset.from_list(complete, features=_features(names, lists))


def _features(names: list[str], lists: list[str]) -> Any:
    from datasets import Features, Value

    try:
        from datasets import Json, List
    except ImportError as error:
        raise ConfigError(
            'Messages that call tools need a later version of datasets: pip install -U "datasets>=4.7".'
        ) from error
    return Features(
        {
            name: List(Json())
            if name in lists
            else Json()
            if name == "chat_template_kwargs"
            else Value("string")
            for name in names
        }
    )


def not_enough_problems(source: str, count: int) -> ConfigError:
    """What to say where nothing can be held out."""
    return ConfigError(
        f"{source}: at least 2 different problems are needed to hold one out, but there is {count}. Add more, or give "
        "held-out data with --eval-data."
    )


def problem_of(row: Row) -> str:
    """What makes two examples the same problem: the prompt, or all that comes before the last answer."""
    if "prompt" in row:
        return json.dumps(row["prompt"], sort_keys=True)
    if "messages" in row:
        return json.dumps(row["messages"][:-1] or row["messages"], sort_keys=True)
    return str(row["text"])
