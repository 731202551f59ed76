"""Errors of a model's files, in one sentence."""

from __future__ import annotations

import pickle

import pytest

from layersample import ConfigError
from layersample.model_files import check_weights, is_path, loading, reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("one\n  two"), "one two."),
        (ValueError("done."), "done."),
        (KeyError(), "KeyError."),
        (RecursionError("x"), "a file of it is nested too deeply."),
        (pickle.UnpicklingError("x"), "its weights are a pickle that isn't opened, because"),
        (OSError("x" * 1000), "x" * 299 + "…"),
    ],
)
def test_reasons_are_one_line(error: Exception, words: str) -> None:
    assert reason(error).startswith(words) and "\n" not in reason(error)


def test_whatever_a_library_raises_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="The model 'm' could not be loaded: wrong. Choose another folder"):
        with loading("m"):
            raise TypeError("wrong")
    with pytest.raises(ConfigError, match="^as it is$"):
        with loading("m"):
            raise ConfigError("as it is")
    with pytest.raises(KeyboardInterrupt):
        with loading("m"):
            raise KeyboardInterrupt


def test_shapes_that_differ_are_named() -> None:
    loaded = {"mismatched_keys": {("head", (2, 3), (4, 3))}, "missing_keys": {"b", "a"}}
    with pytest.raises(ConfigError, match=r"head is \[2, 3\] in the files and \[4, 3\] by config.json"):
        check_weights(loaded, "m")
    assert check_weights({**loaded, "mismatched_keys": set()}, "m") == ["a", "b"]


def test_what_is_meant_as_a_path() -> None:
    paths = ["a", "./a", "/a/b", "a/b/c", "~/a", "a/", "../a"]
    assert all(map(is_path, paths)) and not is_path("organisation/name")
