"""A search for a recipe, with made-up losses whose best recipe is known; and one try on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side import pool
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.recipe_runner import run_recipes
from layersample_benchmarks.side_by_side.report import write_report
from layersample_benchmarks.side_by_side.results import Results, read_results
from layersample_benchmarks.side_by_side.suite import Suite, make_suite
from layersample_benchmarks.side_by_side.training import run_job
from layersample_benchmarks.side_by_side.tried import read_tried

pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")

SEARCH = {
    "method": "lisa",
    "options": {"embeddings": "freeze"},
    "space": {
        "num_active": [1, 2, 3],
        "period": [2, 4],
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    },
    "tries": 10,
    "keep": 2,
    "rungs": 3,
    "seed": 77,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, made_up: Callable[..., dict[str, Any]]) -> list[Job]:
    """The runs that are started: 3 layers are best, at a rate of 0.01, whatever the period."""
    seen: list[Job] = []

    def measure(self: Any, job: Job) -> dict[str, Any]:
        seen.append(job)
        suite: Suite = self._results.suite
        config = suite.config(job)
        far = abs(config.num_active - 3) + abs(config.learning_rate - 0.01) * 10
        return made_up(job, 1 + far / 10 + 1 / job.steps + job.seed / 1e4)

    monkeypatch.setattr(pool.Pool, "_measure", measure)
    return seen


def suite(make_tiny: Callable[..., Suite], **more: Any) -> Suite:
    keys = {"recipes": {"winner": SEARCH}, "steps": 8, "search_steps": 4, **more}
    return make_tiny(["full", "lora"], **keys)


def test_the_best_recipe_is_found_and_confirmed_on_fresh_seeds(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    run_recipes(suite(make_tiny), tmp_path)
    rungs = [job for job in started if job.stage == "rung"]
    assert {(job.steps, job.seed) for job in rungs} == {(2, 77), (4, 77), (8, 77), (8, 78), (8, 79)}
    counts = [sum(job.steps == steps and job.seed == 77 for job in rungs) for steps in (2, 4, 8)]
    assert counts[0] <= 10 and counts[0] > counts[1] > counts[2] > 0, "half of them goes on"
    winner = read_results(tmp_path)[0].entries[-1]
    assert (winner.name, winner.method, winner.options["num_active"]) == ("winner", "lisa", 3)
    assert winner.options["embeddings"] == "freeze"
    finals = [job for job in started if job.row == "winner"]
    assert [(job.stage, job.seed) for job in finals] == [("final", 0), ("final", 1)]
    count = len(started)
    stored = read_results(tmp_path)[0]
    run_recipes(stored, tmp_path)
    assert len(started) == count, "a stored suite has the row that was chosen"
    more = [row.model_copy(update={"seeds": [0, 1, 2]}) for row in stored.entries]
    run_recipes(stored.model_copy(update={"methods": more}), tmp_path)
    assert [job.seed for job in started[count:]] == [2, 2], "with more seeds it is still that row"
    tried = read_tried(tmp_path)[0]
    assert len(tried["tries"]) == 10 and tried["chosen"]["name"] == "winner"
    best = min(one["losses"][-1] for one in tried["tries"] if len(one["losses"]) == 3)
    assert tried["tries"][0]["losses"][-1] == best
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "## What was tried: winner" in page and "10 recipes" in page
    others = [entry.name for entry in stored.entries if entry.name != "winner"]
    write_report(tmp_path, methods=others, output=tmp_path / "others")
    assert "What was tried" not in (tmp_path / "others" / "report.md").read_text(), "its winner isn't there"


def test_the_last_rung_chooses_by_the_mean_of_its_seeds(
    started: list[Job],
    make_tiny: Callable[..., Suite],
    made_up: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recipe that one seed favours isn't the best one."""

    def measure(self: Any, job: Job) -> dict[str, Any]:
        active = self._results.suite.config(job).num_active
        return made_up(job, 1 + active / 10 - 0.5 * (job.seed == 77 and active == 3))

    monkeypatch.setattr(pool.Pool, "_measure", measure)
    space = {"num_active": [1, 3], "learning_rate": [1e-3]}
    chosen = []
    for seeds in (1, 3):
        search = {**SEARCH, "space": space, "rungs": 1, "tries": 6, "seeds": seeds}
        run_recipes(suite(make_tiny, recipes={"winner": search}), tmp_path / str(seeds))
        tried = read_tried(tmp_path / str(seeds))[0]
        chosen.append((tried["chosen"]["options"]["num_active"], round(tried["tries"][0]["losses"][0], 6)))
    assert chosen == [(3, 0.8), (1, 1.1)]


def test_a_search_that_was_changed_or_damaged_is_refused_at_once(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    run_recipes(suite(make_tiny), tmp_path)
    tried, count = next(tmp_path.rglob("tried.json")), len(started)
    before = tried.read_text()
    space: Any = SEARCH["space"]
    other = {**SEARCH, "space": {**space, "num_active": [1]}}
    with pytest.raises(ConfigError, match="holds a search 'winner' over another space"):
        run_recipes(suite(make_tiny, recipes={"winner": other}), tmp_path)
    assert tried.read_text() == before and len(started) == count
    for text in ("", "[]", '{"name": "winner"}'):
        tried.write_text(text)
        with pytest.raises(ConfigError, match="must be what a search has tried, but it is damaged"):
            write_report(tmp_path)


def test_options_of_a_variant_go_together(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    variants: list[dict[str, Any]] = [
        {"sampler": "cyclic"},
        {"sampler": "prior", "sampler_options": {"weights": "increase"}},
    ]
    search = {**SEARCH, "space": {"variant": variants, "learning_rate": [1e-3]}, "tries": 6}
    run_recipes(suite(make_tiny, recipes={"winner": search}), tmp_path)
    tried = read_tried(tmp_path)[0]
    assert {one["chosen"]["variant"]["sampler"] for one in tried["tries"]} == {"cyclic", "prior"}
    assert tried["chosen"]["options"] in [{"embeddings": "freeze", **variant} for variant in variants]
    write_report(tmp_path)
    assert "| sampler prior, sampler_options weights increase |" in (tmp_path / "report.md").read_text()


def test_a_search_that_was_interrupted_goes_on(
    started: list[Job],
    make_tiny: Callable[..., Suite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tries as one that wasn't, and none of them is run twice."""
    run_recipes(suite(make_tiny), tmp_path / "whole")
    whole = [job.key for job in started]
    started.clear()
    measure = pool.Pool._measure

    def stop(self: Any, job: Job) -> Any:
        if len(started) == 7:
            raise KeyboardInterrupt
        return measure(self, job)

    monkeypatch.setattr(pool.Pool, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipes(suite(make_tiny), tmp_path / "parts")
    monkeypatch.setattr(pool.Pool, "_measure", measure)
    run_recipes(suite(make_tiny), tmp_path / "parts")
    assert sorted(job.key for job in started) == sorted(whole)
    tried = [(tmp_path / name / "search/winner/tried.json").read_text() for name in ("whole", "parts")]
    assert tried[0] == tried[1]
    before = len(started)
    run_recipes(read_results(tmp_path / "parts")[0], tmp_path / "parts")  # as the folder has it
    assert len(started) == before


def test_a_search_holds_the_folder_all_along(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = pool.Pool._measure
    other, refused = make_tiny(["lisa"]), []

    def meddle(self: Any, job: Job) -> Any:
        with pytest.raises(ConfigError, match="is in use by another one"):
            Results(tmp_path, other).open()
        refused.append(job.stage)
        return measure(self, job)

    monkeypatch.setattr(pool.Pool, "_measure", meddle)
    run_recipes(suite(make_tiny), tmp_path)
    assert {"rung", "final"} <= set(refused)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "two words", "x" * 92, ""])
def test_a_search_has_the_name_of_a_folder_and_a_row(name: str) -> None:
    with pytest.raises(ConfigError, match="recipes"):
        make_suite(("suite.yaml", {"recipes": {name: SEARCH}}))


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_search_needs_a_job(jobs: int, make_tiny: Callable[..., Suite], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"jobs must be at least 1, but got {jobs}"):
        run_recipes(suite(make_tiny), tmp_path / "new", jobs=jobs)
    assert not (tmp_path / "new").exists()


def test_recipes_that_cannot_be_run_are_tries_that_failed(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Options that don't go together, for some choices: a projection's rank without a projection."""
    space = {"projection": ["galore", None], "rank": [4, None], "learning_rate": [1e-2, 1e-3]}
    search = {**SEARCH, "space": space, "tries": 12, "waves": 1}
    run_recipes(suite(make_tiny, recipes={"winner": search}), tmp_path)
    tries = read_tried(tmp_path)[0]["tries"]
    failed = [one for one in tries if one["error"]]
    assert failed and all(
        one["chosen"]["projection"] is None and one["chosen"]["rank"] == 4 for one in failed
    )
    assert all(one["losses"] for one in tries if not one["error"])


def test_a_rung_is_measured_on_the_validation_split(make_tiny: Callable[..., Suite]) -> None:
    tiny = make_tiny(["lisa"])
    at_rest = {stage: Job("lisa", stage, 0, 0.0, 2) for stage in ("search", "rung", "final")}
    losses = {
        stage: run_job(tiny, job, lambda step: None)["loss"]["held_out"][-1] for stage, job in at_rest.items()
    }
    assert losses["rung"] == losses["search"] != losses["final"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "recipes must hold at least one search"),
        (
            {"winner": {**SEARCH, "seed": 1}},
            "the seeds of winner must be none of the suite's.*but 1 is one of them",
        ),
        ({"lora": SEARCH}, "a search must have a name that no row has.*but lora is among the methods too"),
        ({"winner": {**SEARCH, "method": "liza"}}, "Unknown method 'liza'"),
        ({"winner": {**SEARCH, "options": {"perod": 2}}}, "Unknown option 'perod'. Did you mean 'period'"),
    ],
)
def test_searches_that_cannot_be_run(
    change: dict[str, Any], message: str, make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipes(suite(make_tiny, recipes=change), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"num_active": [1]}, "space must hold learning_rate"),
        (
            {"learning_rate": ["fast"]},
            "values of learning_rate must be finite numbers above 0, but one is 'fast'",
        ),
        ({"learning_rate": [1e-3, 0]}, "but one is 0"),
        ({"learning_rate": {"low": -1.0, "high": 1.0}}, "but one is -1.0"),
        ({"learning_rate": []}, "space must hold values for learning_rate"),
        ({"learning_rate": {"low": 2.0, "high": 1.0}}, "low must be below high, but they are 2 and 1"),
        ({"learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, "low must be above 0 where log is true"),
        (
            {"learning_rate": [1.0], "embeddings": ["train"]},
            "embeddings must be in options, in space or in a v",
        ),
        (
            {"learning_rate": [1.0], "variant": [{"embeddings": "train"}]},
            "embeddings must be in options, in space or in a variant, but it is in two",
        ),
        (
            {"learning_rate": [1.0], "variant": ["cyclic"]},
            "the values of variant must be mappings of options",
        ),
    ],
)
def test_spaces_that_are_none(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_suite(("suite.yaml", {"recipes": {"winner": {**SEARCH, "space": space}}}))


def test_all_seeds_of_a_search_are_seeds() -> None:
    last = {**SEARCH, "seed": 2**32 - 3, "seeds": 3}
    assert make_suite(("suite.yaml", {"recipes": {"winner": last}})).recipes["winner"].seeds_of(0)
    with pytest.raises(ConfigError, match="seed \\+ seeds must be at most 2\\*\\*32"):
        make_suite(("suite.yaml", {"recipes": {"winner": {**last, "seeds": 4}}}))


def test_without_optuna_it_is_said(
    monkeypatch: pytest.MonkeyPatch, make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna: pip install \"layersample\[search\]\""):
        run_recipes(suite(make_tiny), tmp_path)
