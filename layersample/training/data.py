"""Training data: built in, from a file, or from the hub; checked line by line, and split by problem."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersample.errors import NEEDS_TRAIN, ConfigError, unknown
from layersample.training.builtin_data import BUILTIN, Row

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (
    'an example must have "prompt" and "completion" (both text, or both lists of messages), '
    '"messages" (a list of {"role", "content"}), or "text"'
)


def load_split(source: str, eval_source: str | None, *, eval_size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Load the data and hold a part of it out.

    Args:
        source: A built-in name, a JSONL, CSV or Parquet file, or a hub id.
        eval_source: The same for held-out data; ``None`` holds out a part of ``source``.
        eval_size: Held-out problems, at most.
        seed: Seed of the choice of held-out problems.

    Returns:
        The training data and the held-out data. No held-out problem (equal prompt) is in the training data.

    Raises:
        ConfigError: If a source is missing, empty or malformed; it names the line.
    """
    data = load_data(source)
    keys = [_problem(row) for row in data]
    if eval_source is not None:
        held_out = load_data(eval_source)
        held_out = held_out.select(range(min(eval_size, len(held_out))))
        test = {_problem(row) for row in held_out}
    else:
        problems = sorted(set(keys))
        if len(problems) < 2:
            raise ConfigError(
                f"{source}: at least 2 different problems are needed to hold one out, but there is "
                f"{len(problems)}. Add more, or give held-out data with --eval-data."
            )
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


def load_data(source: str) -> Dataset:
    """Load one source.

    Raises:
        ConfigError: As :func:`load_split`.
    """
    try:
        from datasets import Dataset, load_dataset
    except ImportError as error:
        raise ConfigError(f"Training {NEEDS_TRAIN}") from error
    path = Path(source)
    if source in BUILTIN:
        rows = BUILTIN[source]()
        return Dataset.from_list(rows)
    if path.suffix in _READERS or path.exists():
        if not path.is_file():
            raise ConfigError(f"The data file must exist, but there is no file {source!r}.")
        if path.suffix not in _READERS:
            raise ConfigError(f"A data file must end in {', '.join(_READERS)}, but got {source!r}.")
        return Dataset.from_list(_check_all(_READERS[path.suffix](path), source))
    if source.count("/") != 1:
        raise ConfigError(
            f"{unknown('data', source, BUILTIN)} A file ({', '.join(_READERS)}) or a hub id "
            "(organisation/name) will do too."
        )
    try:
        data = load_dataset(source, split="train")
    except Exception as error:  # whatever the hub, the network or the data set's format says
        raise ConfigError(f"{source}: could not be loaded from the hub: {error}") from error
    _check(data[0], f"{source}, first example")
    return data


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: must be one JSON object, but: {error.msg}.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: must be UTF-8 text, but: {error}.") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{place}: must have {len(reader.fieldnames or ())} fields, as the first line."
                    )
                yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}, line {reader.line_num + 1}: must be CSV in UTF-8, but: {error}."
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: must be a Parquet file, but: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _check_all(rows: Iterator[tuple[str, Any]], source: str) -> list[Row]:
    checked: list[Row] = []
    for place, row in rows:
        checked.append(_check(row, place))
        if checked[-1].keys() != checked[0].keys():
            raise ConfigError(
                f"{place}: all examples must have the same fields as the first one "
                f"({', '.join(checked[0])}), but this one has {', '.join(checked[-1])}."
            )
    if not checked:
        raise ConfigError(f"{source}: the file must hold at least one example, but is empty.")
    return checked


def _check(row: Any, place: str) -> Row:
    """The fields of an example that training uses; the others are left out."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place}: {_FORMATS}, but it is a {type(row).__name__}.")
    for fields in (("prompt", "completion"), ("messages",), ("text",)):
        if all(name in row for name in fields):
            break
    else:
        raise ConfigError(f"{place}: {_FORMATS}, but it has {', '.join(map(repr, row)) or 'nothing'}.")
    for name in fields:
        may_be = (
            [_is_messages]
            if name == "messages"
            else [_is_text]
            if name == "text"
            else [_is_text, _is_messages]
        )
        if not any(test(row[name]) for test in may_be):
            raise ConfigError(f"{place}: {_FORMATS}, but {name!r} is {_short(row[name])}.")
        if not row[name] or _is_text(row[name]) and not row[name].strip():
            raise ConfigError(f"{place}: {name!r} must not be empty.")
    if len({_is_text(row[name]) for name in fields}) > 1:
        raise ConfigError(f"{place}: {_FORMATS}, but it mixes text and messages.")
    return {name: row[name] for name in fields}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, Mapping) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in value
    )


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _problem(row: Row) -> str:
    """What makes two examples the same problem: the prompt, or all that comes before the last answer."""
    if "prompt" in row:
        return json.dumps(row["prompt"], sort_keys=True)
    if "messages" in row:
        return json.dumps(row["messages"][:-1], sort_keys=True)
    return str(row["text"])
