"""YAML of options, read strictly: no dates, no binary, nothing twice, nothing too deep; errors name the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from layersample.errors import ConfigError, short, text_fault

_MAX_DEPTH = 50  # of lists and mappings inside of each other; options have three
_MAX_VALUES = 100_000  # with what anchors repeat: a few lines can stand for billions
_MAX_CHARACTERS = 2**20


def parse_yaml(text: str, place: str, *, lines: bool = False) -> Any:
    """What a YAML text says.

    Args:
        text: One document.
        place: Where it comes from, for messages ("run.yaml").
        lines: Whether messages name the line.

    Raises:
        ConfigError: If it can't be read; it names the place.
    """
    try:
        loader = _StrictLoader(text)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        line = _line(error, text) if lines else None
        where = place if line is None else f"{place}, line {line}"
        raise ConfigError(f"{where}: must be YAML, but {_problem(error)}.") from error
    if _count(content) > _MAX_VALUES:
        raise ConfigError(f"{place}: must hold at most {_MAX_VALUES} values, but its anchors repeat more.")
    return content


def read_yaml_file(path: Path) -> Any:
    """What a YAML file says; see :func:`parse_yaml`.

    Raises:
        ConfigError: If it can't be read, or isn't YAML.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character in the path
        raise ConfigError(f"{path}: a configuration file must be readable text, but: {error}.") from error
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{path}: a configuration file must have at most {_MAX_CHARACTERS:,} characters, but has more."
        )
    return parse_yaml(text, str(path), lines=True)


class _StrictLoader(yaml.SafeLoader):
    """Reads text, numbers, true and false, nothing, lists and mappings."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    # Collections are composed and constructed by recursion, so their depth is bounded before Python's own bound.
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise ConstructorError(None, None, f"it is more than {_MAX_DEPTH} levels deep", mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merged = "tag:yaml.org,2002:merge"
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # `<<: *defaults` may be overridden by keys beside it.
            if key_node.tag == merged or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _construct_number(loader: _StrictLoader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.ScalarNode)
    construct = yaml.SafeLoader.yaml_constructors[node.tag]
    try:
        return construct(loader, node)
    except (ValueError, IndexError) as error:  # "0x_", `!!int abc`, `!!int`, more digits than Python reads
        kind = "a whole number" if node.tag.endswith("int") else "a number"
        raise ConstructorError(
            None, None, f"{short(node.value)} can't be read as {kind}", node.start_mark
        ) from error


def _construct_bool(loader: _StrictLoader, node: yaml.Node) -> bool:
    assert isinstance(node, yaml.ScalarNode)
    known = yaml.SafeLoader.bool_values
    if str(node.value).lower() not in known:
        raise ConstructorError(
            None, None, f"{short(node.value)} can't be read as true or false", node.start_mark
        )
    return known[str(node.value).lower()]


def _construct_text(loader: _StrictLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    # JSON writes characters beyond the first 65,536 as two halves; a half alone is no character.
    text = str(node.value).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if fault := text_fault(text):
        raise ConstructorError(None, None, f"the text {short(text)} holds {fault}", node.start_mark)
    return text


def _refuse(loader: _StrictLoader, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise ConstructorError(
        None, None, f"a value of type {tag} isn't an option's: write text or a number", node.start_mark
    )


# YAML 1.2 and JSON read 1e-4 as a number; PyYAML wants 1.0e-4.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)
for _kind in ("timestamp", "binary", "omap", "pairs", "set"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _refuse)
_StrictLoader.add_constructor(None, _refuse)


def _count(value: Any, depth: int = 0) -> int:
    """Values in a value, as often as they come; it stops counting a little above the bound."""
    if depth > _MAX_DEPTH:  # a list that holds itself
        return _MAX_VALUES + 1
    count = 1
    inside = (
        [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    )
    for part in inside:
        count += _count(part, depth + 1)
        if count > _MAX_VALUES:
            break
    return count


def _line(error: yaml.YAMLError, text: str) -> int | None:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    return text.count("\n", 0, error.position) + 1 if isinstance(error, ReaderError) else None


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, ReaderError):
        return f"it holds a character that no text has, at position {error.position}"
    return str(getattr(error, "problem", None) or error).splitlines()[0].removeprefix("but ")
