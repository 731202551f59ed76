from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.results import Results, read_results
from layersample_benchmarks.suite import Job, Suite


@pytest.fixture
def suite() -> Suite:
    return Suite(methods=["lisa", "lora"], learning_rates=[1e-3])


def job(suite: Suite, row: int = 0, seed: int = 0) -> Job:
    return suite.final_jobs(suite.entries[row], 1e-3)[seed]


def test_what_is_added_is_there_again(suite: Suite, tmp_path: Path, made_up: Callable[..., Any]) -> None:
    results = Results(tmp_path / "r", suite).open("layersample benchmark")
    results.add(job(suite), made_up(job(suite), 1.5))
    results.add(job(suite, seed=1), {"error": "out of memory"})
    again = Results(tmp_path / "r", suite).open()
    stored = again.get(job(suite))
    assert stored is not None and stored["loss"]["held_out"][-1] == 1.5
    assert again.get(job(suite, seed=1)) is None, "a failed run is tried again"
    assert again.get(job(suite, row=1)) is None
    assert (tmp_path / "r" / "command.txt").read_text() == "layersample benchmark\n"


def test_a_line_that_was_cut_off_is_left_out(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    results = Results(tmp_path, suite).open()
    results.add(job(suite), made_up(job(suite), 1.5))
    with open(results.path, "a") as file:
        file.write('{"key": "final/lisa/se')
    assert [line["key"] for line in read_results(tmp_path)[1]] == ["final/lisa/seed-0"]
    again = Results(tmp_path, suite).open()
    again.add(job(suite, seed=1), made_up(job(suite), 1.6))
    assert all(json.loads(line) for line in results.path.read_text().splitlines())


def test_a_damaged_line_is_named(suite: Suite, tmp_path: Path) -> None:
    path = Results(tmp_path, suite).open().path
    path.write_text("{no\n{}\n")
    with pytest.raises(ConfigError, match="line 1: must be one JSON object"):
        read_results(tmp_path)


def test_another_suite_is_refused_and_more_rows_and_seeds_are_not(suite: Suite, tmp_path: Path) -> None:
    Results(tmp_path, suite).open()
    more = suite.model_copy(update={"methods": ["lisa", "lora", "full"], "seeds": [0, 1, 2, 3]})
    Results(tmp_path, more).open()
    other = suite.model_copy(update={"steps": 7})
    with pytest.raises(
        ConfigError, match="results of another suite: its steps is 60, but 7 is asked for now"
    ):
        Results(tmp_path, other).open()
    renamed = Suite(methods=[{"name": "lisa", "options": {"period": 9}}], learning_rates=[1e-3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="a method 'lisa' with other options"):
        Results(tmp_path, renamed).open()


def test_a_folder_of_something_else(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        Results(tmp_path, suite).open()
    with pytest.raises(ConfigError, match="holds no suite.yaml"):
        read_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
