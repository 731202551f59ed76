from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.results import Results, read_results
from layersample_benchmarks.side_by_side.suite import Suite


@pytest.fixture
def suite() -> Suite:
    return Suite(methods=["lisa", "lora"], learning_rates=[1e-3])


def job(suite: Suite, row: int = 0, seed: int = 0) -> Job:
    return suite.final_jobs(suite.entries[row], 1e-3)[seed]


def test_what_is_added_is_there_again(suite: Suite, tmp_path: Path, made_up: Callable[..., Any]) -> None:
    results = Results(tmp_path / "r", suite).open("layersample benchmark")
    results.add(job(suite), made_up(job(suite), 1.5))
    results.add(job(suite, seed=1), {"error": "out of memory"})
    results.close()
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
    results.close()
    assert [line["key"] for line in read_results(tmp_path)[1]] == ["final/lisa/seed-0"]
    again = Results(tmp_path, suite).open()
    again.add(job(suite, seed=1), made_up(job(suite), 1.6))
    assert all(json.loads(line) for line in results.path.read_text().splitlines())


def test_a_damaged_line_is_named(suite: Suite, tmp_path: Path) -> None:
    path = Results(tmp_path, suite).open().path
    path.write_text("{no\n{}\n")
    with pytest.raises(ConfigError, match="line 1: must be one JSON object"):
        read_results(tmp_path)


def test_another_suite_is_refused_and_more_rows_and_seeds_are_not(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    first = Results(tmp_path, suite).open()
    first.add(job(suite), made_up(job(suite), 1.5))
    first.close()
    before = first.path.read_text()
    more = suite.model_copy(update={"methods": ["lisa", "lora", "full"], "seeds": [0, 1, 2, 3]})
    Results(tmp_path, more).open().close()
    other = suite.model_copy(update={"steps": 7})
    with pytest.raises(
        ConfigError, match="results of another suite: its steps is 60, but 7 is asked for now"
    ):
        Results(tmp_path, other).open()
    renamed = Suite(methods=[{"name": "lisa", "options": {"period": 9}}], learning_rates=[1e-3])
    with pytest.raises(ConfigError, match="a method 'lisa' with other options"):
        Results(tmp_path, renamed).open().close()
    assert first.path.read_text() == before, "hours of runs aren't dropped for a changed option"
    Results(tmp_path, more).open().close()  # what was refused doesn't keep the folder


def test_rows_of_before_stay_in_the_folder_and_its_report(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    """One row can be run alone, with a baseline that is there already."""
    first = Results(tmp_path, suite).open("the first command")
    first.add(job(suite), made_up(job(suite), 1.5))
    first.close()
    alone = suite.model_copy(update={"methods": ["full"], "baseline": "lora"})
    for _ in range(2):
        results = Results(tmp_path, alone).open("the second command")
        assert results.lines() == [], "only what is asked for is run"
        results.close()
    whole, lines = read_results(tmp_path)
    assert [entry.name for entry in whole.entries] == ["lisa", "lora", "full"]
    assert (whole.reference, [line["method"] for line in lines]) == ("lora", ["lisa"])
    assert (tmp_path / "command.txt").read_text() == "the first command\nthe second command\n"
    with pytest.raises(ConfigError, match="baseline: Unknown method of this suite 'loora'"):
        Results(tmp_path, suite.model_copy(update={"baseline": "loora"})).open()


def test_a_row_beside_others_leaves_them_their_rates_seeds_and_failures(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    first = Results(tmp_path, suite).open()
    first.add(job(suite), made_up(job(suite), 1.5))
    first.add(job(suite, row=1), {"error": "out of memory"})
    first.close()
    alone = Suite(methods=["full"], learning_rates=[3e-4], seeds=[0, 7])
    Results(tmp_path, alone).open().close()
    whole, lines = read_results(tmp_path)
    assert [entry.learning_rates for entry in whole.entries] == [[1e-3], [1e-3], [3e-4]]
    assert [whole.seeds_of(entry) for entry in whole.entries] == [[0, 1, 2], [0, 1, 2], [0, 7]]
    assert [entry.seeds for entry in whole.entries] == [None, None, [0, 7]]
    assert [line.get("error") for line in lines] == [None, "out of memory"]
    for change in ({"seeds": [7]}, {"plugin": Path("other.py")}):
        if "plugin" in change:
            text = (tmp_path / "suite.yaml").read_text()
            (tmp_path / "suite.yaml").write_text(text.replace("plugin: null", "plugin: mine.py"))
        with pytest.raises(ConfigError, match="the plug-in and the first seed must be theirs"):
            Results(tmp_path, alone.model_copy(update=change)).open()


def test_seeds_that_have_been_run_stay_where_fewer_are_asked_for(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    first = Results(tmp_path, suite.model_copy(update={"seeds": [0, 1, 2, 3]})).open()
    for seed in (0, 2):
        first.add(job(suite, seed=seed), made_up(job(suite), 1.5))
    first.close()
    asked = Results(tmp_path, suite.model_copy(update={"seeds": [0, 1]})).open()
    asked.close()
    assert asked.suite.seeds == [0, 1], "what is asked for is run"
    whole = read_results(tmp_path)[0]
    seeds = {entry.name: whole.seeds_of(entry) for entry in whole.entries}
    assert seeds == {"lisa": [0, 1, 2], "lora": [0, 1]}, "what was neither run nor asked for isn't missing"


def test_more_seeds_of_some_rows_are_theirs_alone(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    first = Results(tmp_path, suite).open()
    first.add(job(suite), made_up(job(suite), 1.5))
    first.close()
    more = suite.model_copy(update={"methods": ["lora"], "seeds": [0, 1, 2, 3, 4]})
    results = Results(tmp_path, more).open()
    for seed in more.seeds:
        results.add(job(more, seed=seed), made_up(job(more), 1.5))
    results.close()
    for asked in (more, suite, suite.model_copy(update={"methods": ["lisa"]})):
        Results(tmp_path, asked).open().close()
        whole = read_results(tmp_path)[0]
        seeds = {entry.name: whole.seeds_of(entry) for entry in whole.entries}
        assert seeds == {"lisa": [0, 1, 2], "lora": [0, 1, 2, 3, 4]}
        assert len(read_results(tmp_path)[1]) == 6


def test_final_runs_of_two_rates_are_both_kept(
    suite: Suite, tmp_path: Path, made_up: Callable[..., Any]
) -> None:
    results = Results(tmp_path, suite).open()
    jobs = [suite.final_jobs(suite.entries[0], rate)[0] for rate in (1e-3, 1e-2)]
    for number, one in enumerate(jobs):
        results.add(one, made_up(one, float(number + 1)))
    results.close()
    again = Results(tmp_path, suite).open()
    stored = [again.get(one) for one in jobs]
    assert [line["loss"]["held_out"][-1] for line in stored if line] == [1.0, 2.0]
    again.close()


def test_timings_depend_on_no_rate(suite: Suite, tmp_path: Path, made_up: Callable[..., Any]) -> None:
    """Rates may be added to a folder later: nothing is timed twice, and means are of one set."""
    suite = suite.model_copy(update={"timing_rounds": 1})
    more = suite.model_copy(update={"learning_rates": [1e-4, 1e-3, 1e-2]})
    results = Results(tmp_path, suite).open()
    for number, asked in enumerate((suite, more)):
        for one in (
            asked.timing_jobs(suite.entries[0], {})[0],
            asked.whole_job(suite.entries[0], 6, {}),
        ):
            assert (results.get(one) is None) == (number == 0)
            results.add(one, made_up(one, 1.0))
    results.close()
    assert len(read_results(tmp_path)[1]) == 2


def test_two_benchmarks_in_one_folder(suite: Suite, tmp_path: Path) -> None:
    first = Results(tmp_path, suite).open()
    with pytest.raises(ConfigError, match="One run at a time may write into a folder"):
        Results(tmp_path, suite).open()
    first.close()
    Results(tmp_path, suite).open().close()


def test_a_folder_of_something_else(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        Results(tmp_path, suite).open()
    with pytest.raises(ConfigError, match="holds no suite.yaml"):
        read_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_benchmark_without_a_good_run_binds_nothing(suite: Suite, tmp_path: Path) -> None:
    """A model that isn't there fails every run; the right one may have the folder."""
    first = Results(tmp_path, suite.model_copy(update={"model": "nope"})).open()
    for row in range(2):
        first.add(job(suite, row=row), {"error": "Unknown model 'nope'"})
    first.close()
    alone = suite.model_copy(update={"methods": ["lisa"], "baseline": None})
    Results(tmp_path, alone).open().close()
    stored, lines = read_results(tmp_path)
    assert (stored.model, [entry.name for entry in stored.entries], lines) == (suite.model, ["lisa"], [])
    with pytest.raises(ConfigError, match="baseline: Unknown method of this suite 'lora'"):
        Results(tmp_path, alone.model_copy(update={"baseline": "lora"})).open()


def test_an_empty_suite_is_none(suite: Suite, tmp_path: Path) -> None:
    Results(tmp_path, suite).open().close()
    (tmp_path / "suite.yaml").write_text("")
    with pytest.raises(ConfigError, match="suite.yaml: must be the suite of a benchmark, but it is empty"):
        read_results(tmp_path)


def test_a_benchmark_that_was_killed_as_it_began(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / ".lock").touch()
    Results(tmp_path, suite).open().close()
