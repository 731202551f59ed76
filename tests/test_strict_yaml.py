"""YAML that is malformed, or means something else than options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample.strict_yaml import parse_yaml, read_yaml_file

BILLIONS = "\n".join(
    [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)),
    ]
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-31", "2024-01-31"),
        ("2024-13-45", "2024-13-45"),
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("0.5", 0.5),
        ("7", 7),
        ("~", None),
        ("on", True),
        (r'"\ud83d\ude00"', "😀"),
        ("e5", "e5"),
        ("{a: &x {b: 1}, c: {<<: *x, b: 2}}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_what_values_mean(text: str, value: Any) -> None:
    read = parse_yaml(text, "x")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 0x_", "line 2: .*'0x_' can't be read as a whole number"),
        ("a: !!int abc", "'abc' can't be read as a whole number"),
        ("a: !!int ''", "'' can't be read as a whole number"),
        ("a: !!float abc", "'abc' can't be read as a number"),
        ("a: !!bool perhaps", "'perhaps' can't be read as true or false"),
        ("a: " + "9" * 5000, "can't be read as a whole number"),
        ("a: !!timestamp 2024-13-45", "a value of type !!timestamp isn't an option's"),
        ("a: !!binary aGk=", "a value of type !!binary isn't an option's"),
        ("a: !!set {b}", "a value of type !!set isn't"),
        ("a: !!python/name:os.system", "a value of type !!python/name:os.system isn't"),
        ("a: !mine x", "a value of type !mine isn't"),
        ("a: 1\n\na: 2", "line 3: .* the key 'a' comes twice"),
        ("a: {b: 1, b: 1}", "the key 'b' comes twice"),
        ("a: \n" + "  " + "[" * 900, "line 2: .* it is more than 50 levels deep"),
        ("{a: " * 100, "it is more than 50 levels deep"),
        ('a: "x\\0y"', "holds a NUL character"),
        ("a: x\0y", "holds a character that no text has, at position 4"),
        (r'a: "\ud800"', "holds half of a character"),
        ("a: &x [*x]", "must hold at most 100000 values, but its anchors repeat more"),
        (BILLIONS, "must hold at most 100000 values, but its anchors repeat more"),
        ("? [a]\n: b", "unhashable key"),
        ("a: 1\n--- \nb: 2", "found another document"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"run.yaml.*{message}") as caught:
        read_yaml_file(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfsteps: 7\n")
    assert read_yaml_file(path) == {"steps": 7}, "a byte order mark is no part of the text"
    path.write_bytes("steps: 7\n".encode("utf-16"))
    for unreadable in (path, tmp_path, tmp_path / "no.yaml", Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(ConfigError, match="must be readable text, but"):
            read_yaml_file(unreadable)
    path.write_text("a: " + "x" * 2**20)
    with pytest.raises(ConfigError, match="at most 1,048,576 characters"):
        read_yaml_file(path)
