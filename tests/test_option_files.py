"""Options of several sources, each checked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layersample import ConfigError
from layersample.config import TrainConfig, make_config
from layersample.option_files import parse_pairs

NUMBERS = [
    name
    for name, field in TrainConfig.model_fields.items()
    if field.annotation in (int, float, int | None, float | None)
]


def refused(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(("run.yaml", options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, math.inf, -math.inf, math.nan, -1, 2**63, 1e99, "x", [1], {}])
def test_no_number_is_taken_that_can_t_be_meant(name: str, value: Any) -> None:
    if name == "clip" and value in (1e99, 2**63):
        return  # a bound that clips nothing is one that people give
    message = refused({name: value})
    assert message.startswith(f"run.yaml: {name}: ") and message.endswith(f"but got {value!r}.")


def test_a_whole_number_isn_t_given_as_a_fraction() -> None:
    assert "valid integer, without a fractional part, but got 4.0" in refused({"steps": 4.0})
    assert make_config(("x", {"learning_rate": 1})).learning_rate == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ["a"]}, r"output: Input should be a path, but got \['a'\]"),
        ({"output": ""}, "output: Input should be a path, but got ''"),
        ({"output": 3}, "output: Input should be a path, but got 3"),
        ({"output": "a\0b"}, "output: Input should be plain text, but it holds a NUL character"),
        ({"model": None}, "model: Input should be a valid string, but got None"),
        ({"model": "\ud800"}, "model: .* half of a character"),
        ({"trainer": {"run_name": "a\0"}}, "trainer: .* NUL"),
        ({"sampler_options": {"a": ["\udfff"]}}, "sampler_options: .* half of a character"),
        ({"budget": True}, "budget: Input should not be true or false"),
    ],
)
def test_values_of_other_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: {message}"):
        make_config(("run.yaml", options))


def test_what_a_flag_replaces_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="run.yaml: model: .* but got None"):
        make_config(("run.yaml", {"model": None}), ("command line", {"model": "a/b"}))
    # Whether options go together is asked of what is left of them.
    make_config(("run.yaml", {"resume": True}), ("command line", {"output": "here"}))


def test_several_faults_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(("run.yaml", {"steps": 0, "period": "often"}))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["steps", "period"]


def test_a_long_value_is_cut() -> None:
    assert len(refused({"precision": "x" * 100_000})) < 400


def test_pairs_of_a_command_line() -> None:
    assert parse_pairs(["a=1", "b=x=y", "c=[1, 2]", "d=2024-13-45", "e="], "trainer") == {
        "a": 1,
        "b": "x=y",
        "c": [1, 2],
        "d": "2024-13-45",
        "e": None,
    }
    for pair, message in (
        ("a", "must be given as KEY=VALUE, but got 'a'"),
        ("=1", "must be given as KEY=VALUE"),
        ("a=!!int abc", "trainer: the value of a: must be YAML, but 'abc' can't be read as a whole number"),
        ("a=[", "trainer: the value of a: must be YAML"),
    ):
        with pytest.raises(ConfigError, match=f"command line: .*{message}"):
            parse_pairs([pair], "trainer")
