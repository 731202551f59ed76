"""Rows of data out of files: JSONL, JSON, CSV, Parquet and plain text, compressed or not, one or many."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from layersample.errors import ConfigError, repeated, some

Place = tuple[str, Any]
"""Where a row is, for messages, and what it holds."""

_HOLDERS = ("instances", "data", "train", "examples", "rows")  # of a JSON mapping that holds the examples

_PIECE = 2**16  # characters that are read at a time

_LARGEST_FIELD = 2**31 - 1  # characters of a field of CSV: 2**17 by default, which a long text is beyond

_BROKEN = (OSError, EOFError, zlib.error, UnicodeDecodeError)  # of a file that can't be read to its end


def is_file_source(source: str) -> bool:
    """Whether data is meant to come from files: there is such a path, or the name ends as files do."""
    return any(_suffix(Path(part)) in READERS or _exists(Path(part)) for part in _parts(source))


def read_rows(source: str) -> Iterator[Place]:
    """The rows of a file, of several files (with commas), or of all files in a folder.

    Raises:
        ConfigError: If a file is missing, empty or malformed; it names the file and line.
    """
    for path in files_of(source):
        empty = True
        for place in READERS[_suffix(path)](path):
            empty = False
            yield place
        if empty:
            raise ConfigError(f"{path}: the file must hold at least one example, but is empty.")


def files_of(source: str) -> list[Path]:
    """The files of a source: one, several (with commas), or all that can be read in a folder.

    Raises:
        ConfigError: If one is missing, of another kind, or a folder holds none.
    """
    files: list[Path] = []
    for part in _parts(source):
        path = Path(part)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in READERS)
            if not inside:
                held = some(sorted(p.name for p in path.iterdir()))
                raise ConfigError(f"A folder of data must hold files of {_KNOWN}, but {part!r} holds {held}.")
            files += inside
        elif not _exists(path):
            raise ConfigError(f"The data file must exist, but there is no file {part!r}.")
        elif _suffix(path) not in READERS:
            raise ConfigError(f"A data file must end in {_KNOWN}, but got {part!r}.")
        else:
            files.append(path)
    return files


def _parts(source: str) -> list[str]:
    if "," not in source or _exists(Path(source)):
        return [source]
    return [part.strip() for part in source.split(",") if part.strip()]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or a NUL character
        return False


def _suffix(path: Path) -> str:
    """How a file ends, but for its compression."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


@contextmanager
def _open(path: Path, reached: Callable[[], str] = str) -> Iterator[TextIO]:
    """A file of text to read.

    Args:
        path: The file, compressed or not.
        reached: Says how far it was read, for the message where it can't be read to its end.
    """
    try:
        # utf-8-sig: Windows' programs begin a file with a byte order mark, which is no part of the first name.
        if path.suffix == ".gz":
            opened: TextIO = gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        else:
            opened = open(path, encoding="utf-8-sig", newline="")
        with opened as file:
            yield file
    except _BROKEN as error:
        raise ConfigError(f"{path}{reached()}: must be UTF-8 text, but: {error}.") from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        return file.read()


def _read_jsonl(path: Path) -> Iterator[Place]:
    number = 0
    with _open(path, lambda: f", after line {number}") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parse(line, place)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose names comes once: of two the last would win."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"{some(repeated(name for name, _ in pairs))} comes twice")
    return content


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: must be one JSON object, but: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ConfigError(f"{place}: must be one JSON object, but: {str(error).split(';')[0]}.") from error


def _read_json(path: Path) -> Iterator[Place]:
    """A list of examples, a mapping that holds one (LMFlow's ``instances``), or lines of JSON under this name."""
    if _begins_with(path, "["):
        yield from _read_array(path)
        return
    text = _read_text(path)
    if not text.strip():
        return
    first, _, rest = text.strip().partition("\n")
    if rest and _is_object(first):
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() ends lines within texts too
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")
        return
    content = _parse(text, str(path))
    if isinstance(content, Mapping):
        lists = [key for key in _HOLDERS if isinstance(content.get(key), list)]
        others = [key for key, value in content.items() if key not in lists[:1] and _holds_examples(value)]
        if lists and others:
            raise ConfigError(
                f"{path}: must hold one list of examples, but holds {some([lists[0], *others])}: put each into a file "
                "of its own, and name that of held-out ones by eval_data."
            )
        content = content[lists[0]] if lists else [content]
    if not isinstance(content, list):
        raise ConfigError(f"{path}: must hold a list of examples, but holds a {type(content).__name__}.")
    for number, row in enumerate(content, 1):
        yield f"{path}, example {number}", row


def _holds_examples(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _begins_with(path: Path, mark: str) -> bool:
    with _open(path) as file:
        while (character := file.read(1)).isspace():
            continue
        return character == mark


def _read_array(path: Path) -> Iterator[Place]:
    """The examples of a JSON list one by one: the file may be larger than memory."""
    number = 0
    try:
        with _open(path, lambda: f", after example {number}") as file:
            text = file.read(_PIECE).lstrip()[1:]
            while True:
                try:
                    taken = _take(text, first=not number)
                except json.JSONDecodeError as error:  # it may be whole in what comes next
                    if not (more := file.read(max(_PIECE, len(text)))):
                        raise ConfigError(
                            f"{path}, after example {number}: must be one JSON object, but: {error.msg}."
                        ) from error
                    text += more
                    continue
                if taken is None:
                    break
                number += 1
                row, text = taken
                yield f"{path}, example {number}", row
            if (text.lstrip()[1:] + file.read()).strip():
                raise ConfigError(f"{path}: must be one list of examples, but something follows its end.")
    except RecursionError as error:
        raise ConfigError(f"{path}: must be one JSON object, but: {error}.") from error


def _take(text: str, *, first: bool) -> tuple[Any, str] | None:
    """The next example in the text of a list, and what follows it; nothing at the end of the list.

    Raises:
        json.JSONDecodeError: If the text holds no whole example.
        RecursionError: If there are too many brackets in one another.
    """
    text = text.lstrip()
    if text.startswith("]"):
        return None
    if not first:
        if not text.startswith(","):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, 0)
        text = text[1:].lstrip()
    try:
        row, end = json.JSONDecoder(object_pairs_hook=_once).raw_decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # thousands of digits
        raise json.JSONDecodeError(str(error).split(";")[0], text, 0) from error
    if not text[end:].strip():  # a number may go on
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return row, text[end:]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path) -> Iterator[Place]:
    line = 0
    try:
        with _open(path, lambda: f", after line {line}") as file:
            csv.field_size_limit(_LARGEST_FIELD)
            reader = csv.DictReader(file, strict=True)
            _check_names(path, reader.fieldnames or ())
            for row in reader:
                line = reader.line_num
                place = f"{path}, line {line}"
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{place}: must have {len(reader.fieldnames or ())} fields, as the first line."
                    )
                yield place, row
    except csv.Error as error:
        raise ConfigError(f"{path}, line {line + 1}: must be CSV in UTF-8, but: {error}.") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    if twice := repeated(names):
        raise ConfigError(
            f"{path}, line 1: each column must have a name of its own, but {some(twice)} comes twice."
        )


def _read_parquet(path: Path) -> Iterator[Place]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, *_BROKEN) as error:
        where = f", after row {number}" if number else ""
        raise ConfigError(f"{path}{where}: must be a Parquet file, but: {error}") from error


def _read_plain(path: Path) -> Iterator[Place]:
    """Plain text: an example for each piece between empty lines."""
    piece, begin, number = list[str](), 0, 0
    with _open(path, lambda: f", after line {number}") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                begin = begin or number
                piece.append(line)
            elif piece:
                yield f"{path}, line {begin}", {"text": "".join(piece).strip()}
                piece, begin = [], 0
    if piece:
        yield f"{path}, line {begin}", {"text": "".join(piece).strip()}


READERS: dict[str, Callable[[Path], Iterator[Place]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_plain,
}
_KNOWN = f"{', '.join(READERS)} (or one of them and .gz)"
