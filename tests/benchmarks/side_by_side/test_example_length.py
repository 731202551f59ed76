"""Tokens of the longest example that the runs of a suite train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side import matching
from layersample_benchmarks.side_by_side.example_length import longest_example
from layersample_benchmarks.side_by_side.jobs import Given
from layersample_benchmarks.side_by_side.matching import Matching
from layersample_benchmarks.side_by_side.pool import Pool
from layersample_benchmarks.side_by_side.recipe_space import RecipeSpace
from layersample_benchmarks.side_by_side.recipes import RecipeSearch
from layersample_benchmarks.side_by_side.results import Results
from layersample_benchmarks.side_by_side.suite import Suite

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


def write(folder: Path, completion: str) -> str:
    path = folder / "own.jsonl"
    rows = [{"prompt": f"{n}:", "completion": f" {completion}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_is_that_of_the_examples_but_no_longer_than_a_run_takes(
    make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    suite = make_tiny(["lisa"], task=write(tmp_path, "yes"), max_length=64)
    short = longest_example(suite)
    assert 0 < short < 16
    assert short < longest_example(make_tiny(["lisa"], task=write(tmp_path, "yes " * 9), max_length=64)) < 64
    assert longest_example(make_tiny(["lisa"], task=write(tmp_path, "yes " * 99), max_length=64)) == 64


def test_memory_is_planned_for_it(make_tiny: Callable[..., Suite], tmp_path: Path) -> None:
    """A limit that is far above all examples changes nothing."""

    def given(folder: str, **more: Any) -> Given:
        suite = make_tiny(["lora", "lisa"], match="memory", task=write(tmp_path, "yes"), batch_size=4, **more)
        results = Results(tmp_path / folder, suite).open()
        matching = Matching(suite, results)
        matching.fit_memory()
        results.close()
        found = matching.given(suite.entries[1])
        assert found is not None, matching.why_not(suite.entries[1])
        return found

    assert given("short", max_length=16) == given("long", max_length=256)


def test_what_a_search_fits_is_planned_for_the_examples_of_the_runs_that_confirm_it(
    make_tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(Pool, "run", lambda *_, **__: None)

    def longest(suite: Suite) -> int:
        asked.append(suite.all_seeds)
        return 16

    monkeypatch.setattr(matching, "longest_example", longest)
    space = RecipeSpace(
        method="lisa",
        space={"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
        tries=2,
        keep=2,
        seed=9,
    )
    suite = make_tiny(["lora"], match="memory", task=write(tmp_path, "yes"), seeds=[0, 1], max_length=64)
    search = RecipeSearch("best", space, suite, tmp_path / "search", jobs=1, threads=1)
    with pytest.raises(ConfigError, match="No recipe of best"):  # no run is done here
        search.run()
    assert asked and all(seeds == [0, 1] for seeds in asked)
