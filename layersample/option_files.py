"""Options of several sources (files, flags), laid over each other and checked source by source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from layersample.errors import ConfigError, short, text_fault, unknown
from layersample.strict_yaml import parse_yaml, read_yaml_file

_NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


class Options(BaseModel):
    """Options that take what is meant and nothing else: no ``true`` or text for a number, no 2.5 for a whole one.

    Numbers are finite, and may be single ones of NumPy or torch. Unknown names are refused.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True, arbitrary_types_allowed=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _means_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        value = _python_number(value, annotation)
        check_plain(value, annotation)
        return value


_Options = TypeVar("_Options", bound=BaseModel)
Source = tuple[str, Mapping[str, Any]]


def make_options(model: type[_Options], sources: Sequence[Source], kind: str) -> _Options:
    """Make options from several sources. What a later source replaces is checked as well.

    Args:
        model: The options.
        sources: Pairs of a source's name ("run.yaml", "command line") and what it says; a later one wins. A source
            without a name is the arguments of a call.
        kind: What a key is called in messages.

    Raises:
        ConfigError: If a key is unknown or a value can't be used; it names the source, the key and the value.
    """
    merged, source_of = merge_sources(sources, kind, model.model_fields)
    for name, values in sources:
        try:
            model(**values)
        except ValidationError as error:
            # Whether options go together is asked of all of them, below.
            if faults := [fault for fault in error.errors() if fault["loc"] and fault["loc"][0] in values]:
                raise ConfigError(_explain(faults, values, dict.fromkeys(values, name))) from error
    try:
        return model(**merged)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors(), merged, source_of)) from error


def merge_sources(
    layers: Iterable[Source], kind: str, known: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay mappings of several sources over each other.

    Args:
        layers: Pairs of a source's name and what it says; a later one wins.
        kind: What a key is called in messages.
        known: The keys there are.

    Returns:
        All values by key, and of each key the source that it comes from.

    Raises:
        ConfigError: If a key is unknown; it names the source.
    """
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}
    for source, values in layers:
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{source}: {unknown(kind, str(key), known)}".removeprefix(": "))
            merged[key] = value
            source_of[key] = source
    return merged, source_of


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ConfigError: If the file can't be read, is no YAML, or isn't a mapping; it names the line.
    """
    content = read_yaml_file(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold a mapping of options to values, but holds a {type(content).__name__}."
        )
    return content


def parse_pairs(pairs: Iterable[str], what: str) -> dict[str, Any]:
    """Turn KEY=VALUE pairs of a command line into a dictionary; values are YAML, so 0.5 is a number.

    Args:
        pairs: As they were typed.
        what: What they are, for messages ("trainer").

    Raises:
        ConfigError: If one isn't KEY=VALUE, or its value isn't YAML.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"command line: {what} must be given as KEY=VALUE, but got {short(pair)}.")
        parsed[key] = parse_yaml(value, f"command line: {what}: the value of {key}")
    return parsed


def check_plain(value: Any, annotation: Any) -> None:
    """Make sure that a value is meant as one of a type, where pydantic would convert it without a word.

    Args:
        value: As a file or the command line gave it.
        annotation: The type that is wanted.

    Raises:
        ValueError: If it isn't; the message goes before ", but got …".
    """
    kinds = list(_kinds(annotation))
    wanted = [kind for kind in kinds if kind in _NUMBERS]
    words = any(kind in (str, Any, object) or get_origin(kind) is Literal for kind in kinds)
    if wanted and isinstance(value, str | bytes) and not words:
        raise ValueError(f"Input should be {_NUMBERS[wanted[-1]]}, not text")
    if (
        wanted == [bool]
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and object not in kinds
    ):
        raise ValueError("Input should be true or false")
    if isinstance(value, bool) and bool not in kinds and Any not in kinds:
        raise ValueError("Input should not be true or false")
    if isinstance(value, float) and int in kinds and float not in kinds:
        raise ValueError("Input should be a valid integer, without a fractional part")
    if (
        Path in kinds
        and not (value is None and type(None) in kinds)
        and not (isinstance(value, str | Path) and str(value))
    ):
        raise ValueError("Input should be a path")
    if isinstance(value, list):
        for kind in kinds:
            if get_origin(kind) is list:
                for part in value:
                    check_plain(part, get_args(kind)[0])
    for text in _texts(value):
        if fault := text_fault(text):
            raise ValueError(f"Input should be plain text, but it holds {fault}")


def _python_number(value: Any, annotation: Any) -> Any:
    """A single number of NumPy's or torch's as Python's own, where a number is wanted; anything else as it is."""
    item = getattr(value, "item", None)
    if not callable(item) or getattr(value, "ndim", None) != 0 or getattr(value, "is_meta", False):
        return value
    return item() if any(kind in _NUMBERS for kind in _kinds(annotation)) else value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in a union; a type alone is its own."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    yield annotation
    for member in members:
        yield from _kinds(member)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _explain(faults: Sequence[Any], given: Mapping[str, Any], source_of: Mapping[str, str]) -> str:
    """A line for each key that can't be used, or for each pair that doesn't go together."""
    lines: dict[str, str] = {}
    order = {key: number for number, key in enumerate(given)}
    for fault in sorted(
        faults, key=lambda fault: order.get(str(fault["loc"][0]), -1) if fault["loc"] else -1
    ):
        message = str(fault["msg"]).removeprefix("Value error, ")
        if not fault["loc"]:
            lines[message] = f"{message}."
            continue
        key = str(fault["loc"][0])
        place = ".".join(map(str, _place(fault["loc"], given)))
        source = source_of.get(key, "default")
        came = short(fault["input"], 200)
        if source:
            line = f"{source}: {place}: {message}, but got {came}."
        else:
            line = f"{place} {message.replace('Input should', 'must', 1)}, but got {place}={came}."
        lines.setdefault(key, line)
    return "\n".join(lines.values())


def _place(loc: Sequence[str | int], given: Any) -> list[str | int]:
    """Where a value lies in what was given: pydantic's place, without the names of types that it tried."""
    place: list[str | int] = []
    for number, part in enumerate(loc):
        if isinstance(given, Mapping) and part in given:
            given = given[part]
        elif isinstance(given, list) and isinstance(part, int) and part < len(given):
            given = given[part]
        elif not (isinstance(given, Mapping) and number == len(loc) - 1):  # a key that is missing
            continue
        place.append(part)
    return place
