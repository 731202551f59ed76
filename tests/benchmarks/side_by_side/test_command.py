from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from layersample import ConfigError
from layersample.cli import app as cli
from layersample_benchmarks.side_by_side import command
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.live import LiveBenchmark
from layersample_benchmarks.side_by_side.results import Results
from layersample_benchmarks.side_by_side.suite import Suite

runner = CliRunner()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Suite, Path, int]]:
    """What the command would run."""
    seen: list[tuple[Suite, Path, int]] = []
    monkeypatch.setattr(command, "_run", lambda *arguments, **_: seen.append(arguments))
    return seen


def invoke(*arguments: str) -> str:
    result = runner.invoke(cli.app, ["benchmark", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_without_options_it_is_the_default_suite(given: list[Any]) -> None:
    invoke()
    suite, output, jobs = given[0]
    assert (suite.task, suite.seeds, suite.steps, suite.reference) == ("gsm_symbolic", [0, 1, 2], 60, "full")
    assert suite.options["precision"] == "bf16"
    assert (output, jobs) == (Path("runs/benchmark"), 1)


def test_options_that_are_none_are_named(given: list[Any], tmp_path: Path) -> None:
    for text in ("null", "5"):
        (tmp_path / "own.yaml").write_text(f"options: {text}\n")
        with pytest.raises(ConfigError, match="options"):
            invoke("--suite", str(tmp_path / "own.yaml"), "--option", "period=2")
    assert not given


def test_flags(given: list[Any], tmp_path: Path) -> None:
    invoke(
        *("--methods", "lisa, owlore+galore,mine", "--plugin", "mine.py", "--seeds", "2", "--steps", "100"),
        *("--output", "results/mine", "--lr-grid", "1e-4,1e-3", "--jobs", "3", "--baseline", "lisa"),
        *("--option", "period=7", "--option", "state=keep", "--set", "test_size=8"),
    )
    suite, output, jobs = given[0]
    assert suite.methods == ["lisa", "owlore+galore", "mine"]
    assert (suite.plugin, suite.seeds, suite.steps, suite.baseline) == (Path("mine.py"), [0, 1], 100, "lisa")
    assert suite.learning_rates == [1e-4, 1e-3] and suite.test_size == 8
    assert suite.options == {"precision": "bf16", "num_active": 2, "period": 7, "state": "keep"}
    assert (output, jobs) == (Path("results/mine"), 3)


def test_a_row_of_the_suite_is_a_method_by_its_name(given: list[Any]) -> None:
    """The runs of one row can be asked for, with the options that the suite gives it."""
    invoke("--methods", "prior-increasing,lisa")
    prior, lisa = given[0][0].entries
    assert (prior.method, prior.options) == ("prior", {"sampler_options": {"weights": "increase"}})
    assert (lisa.name, lisa.options) == ("lisa", {})


def test_a_grid_and_seeds_are_for_every_row(given: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        yaml.safe_dump({"methods": [{"name": "lisa", "learning_rates": [1.0], "seeds": 9}, "lora"]})
    )
    invoke("--suite", str(path), "--lr-grid", "1e-4,1e-3")
    invoke("--suite", str(path), "--seeds", "2")
    (grid, *_), (seeds, *_) = given
    assert [(grid.rates(row), len(grid.seeds_of(row))) for row in grid.entries] == [
        ([1e-4, 1e-3], 9),
        ([1e-4, 1e-3], 3),
    ]
    assert [seeds.seeds_of(row) for row in seeds.entries] == [[0, 1]] * 2 and seeds.rates(
        seeds.entries[0]
    ) == [1.0]


def test_a_suite_file_and_seeds_by_number(given: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"methods": ["lisa"], "steps": 5}))
    invoke("--suite", str(path), "--seeds", "4,9")
    assert (given[0][0].steps, given[0][0].seeds, given[0][0].options) == (5, [4, 9], {})
    invoke("--suite", str(path), "--seeds", "1, 8-10")
    assert given[1][0].seeds == [1, 8, 9, 10]


def test_a_folder_with_results_is_gone_on_with(given: list[Any], tmp_path: Path) -> None:
    Results(tmp_path, Suite(methods=["lisa"], steps=5)).open()
    invoke("--output", str(tmp_path))
    assert (given[0][0].entries[0].name, given[0][0].steps) == ("lisa", 5)
    invoke("--output", str(tmp_path), "--suite", "default")  # asked for, it is that one
    assert given[1][0].steps == 60 and len(given[1][0].entries) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "defualt"], "Unknown suite 'defualt'. Did you mean 'default'.*A YAML file will do too"),
        (["--suite", "no.yaml"], "no.yaml: a configuration file must be readable"),
        (["--seeds", "two"], "seeds must be a number, or numbers and ranges with commas, but got 'two'"),
        (["--seeds", "1-2-3"], "numbers and ranges with commas, but got '1-2-3'"),
        (["--seeds", ","], "numbers and ranges with commas, but got ','"),
        (["--seeds", "9-8"], "range of seeds must go up, by at most 1000, but got 9-8"),
        (["--seeds", "3,0-99999999999"], "must go up, by at most 1000, but got 0-99999999999"),
        (["--seeds", "0"], "number of seeds must be from 1 to 1000, but got 0"),
        (["--steps", "0"], "command line: steps: .* but got 0"),
        (["--option", "period"], "must be given as KEY=VALUE, but got 'period'"),
        (["--set", "sets=1"], "command line: Unknown key of a suite 'sets'. Did you mean 'steps'"),
        (["--lr-grid", "1e-3,fast"], "learning_rates must be numbers with commas, but got '1e-3,fast'"),
        (["report", "no-such-folder"], "must be that of a benchmark, but no-such-folder holds no suite.yaml"),
    ],
)
def test_errors_of_the_user_s_making(given: list[Any], arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke(*arguments)


def test_runs_and_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_up: Callable[..., dict[str, Any]]
) -> None:
    """The whole command, with made-up runs; stopped once, and gone on with."""

    def measure(self: Any, job: Any) -> dict[str, Any]:
        if job.key == stop_at:
            raise KeyboardInterrupt
        return {"error": "no [good]"} if job.row == "lora" else made_up(job, 1.0 + job.seed / 10)

    monkeypatch.setattr("layersample_benchmarks.side_by_side.pool.Pool._measure", measure)
    arguments = [
        "--methods",
        "lisa,lora",
        "--seeds",
        "2",
        "--lr-grid",
        "1e-3",
        "--set",
        "threads=1",
        "--output",
        str(tmp_path / "out"),
    ]
    stop_at = "final/lisa/seed-0"
    stopped = runner.invoke(cli.app, ["benchmark", *arguments])
    assert "Interrupted. The same command goes on." in stopped.output, "there is nothing to report yet"
    stop_at = "final/lora/seed-0"
    stopped = runner.invoke(cli.app, ["benchmark", *arguments])
    assert stopped.exit_code == 130 and "shows what is done" in stopped.output
    assert "Written to" in invoke("report", str(tmp_path / "out")), "of what is done"
    stop_at = ""
    output = invoke(*arguments)
    assert "of 4 runs are there already" in output
    assert "final/lora/seed-0: failed: no [good]" in output
    assert "final/lisa/seed-1: held-out loss 1.1000" in stopped.output + output
    assert "report.html, report.md" in output
    page = tmp_path / "out" / "report.md"
    assert "no [good]" in page.read_text() and "difference to lisa, seed by seed" in page.read_text()
    invoke("report", str(tmp_path / "out"), "--baseline", "lora")
    assert "difference to lora, seed by seed" in page.read_text()
    other = tmp_path / "other"
    assert f"Written to {other}" in invoke("report", str(tmp_path / "out"), "--output", str(other)).replace(
        "\n", ""
    )
    assert "difference to lisa, seed by seed" in (other / "report.md").read_text()
    assert "difference to lora, seed by seed" in page.read_text(), "as it was"
    invoke("report", str(tmp_path / "out"), "--baseline", "lora", "--output", str(other))
    (other / "report.html").rename(other / "mine.html")
    for place, why in ((other, "it holds mine.html"), (page, "it is a file")):
        with pytest.raises(ConfigError, match=f"a folder that is new or empty, but .*: {why}"):
            invoke("report", str(tmp_path / "out"), "--output", str(place))
    with pytest.raises(ConfigError, match="baseline: Unknown method of this suite 'lara'"):
        invoke("report", str(tmp_path / "out"), "--baseline", "lara")


def test_baselines_that_are_not_installed_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_up: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setattr("layersample_benchmarks.methods.method.find_spec", lambda name: None)
    monkeypatch.setattr(
        "layersample_benchmarks.side_by_side.pool.Pool._measure",
        lambda self, job: made_up(job, 1.0 + job.seed / 10),
    )
    output = invoke("--seeds", "1", "--lr-grid", "1e-3", "--output", str(tmp_path / "out"))
    assert 'Left out: badam, which needs badam: pip install "layersample[baselines]"' in output
    assert "final/badam" not in output and "final/lisa-published/seed-0" in output
    with pytest.raises(ConfigError, match=r"'badam' needs the package badam.*layersample\[baselines\]"):
        invoke("--methods", "badam", "--output", str(tmp_path / "other"))


def test_the_bars_on_a_terminal() -> None:
    """One for all runs, and one for each that goes on, which goes with its end."""
    screen = Console(force_terminal=True, file=io.StringIO(), width=100)
    live = LiveBenchmark(screen)
    first, second = (Job(row, "final", 0, 1e-3, 4) for row in ("lisa", "lora"))
    live.begin(6, 2)
    live.step(first, 1, 4, 1.25)
    live.step(second, 2, 4, 1.5)
    assert [(task.description, task.completed, task.total) for task in live._bar.tasks] == [
        ("all runs", 2, 6),
        ("final/lisa/seed-0", 1, 4),
        ("final/lora/seed-0", 2, 4),
    ]
    live.end_run(first, {"error": "no [good]"})
    live.end()
    assert [task.description for task in live._bar.tasks] == ["all runs", "final/lora/seed-0"]
    assert live._bar.tasks[0].completed == 3
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 6 runs are there already." in text and "no [good]" in text and "loss 1.500" in text


def test_a_line_a_run_where_no_terminal_is() -> None:
    """With how many there are, and the time that the others will take."""
    seconds = iter([0.0, 60.0, 8000.0])
    screen = Console(file=io.StringIO(), width=100)
    live = LiveBenchmark(screen, now=lambda: next(seconds))
    live.begin(6, 2)
    live.end_run(Job("lisa", "final", 0, 1e-3, 4), {"error": "no [good]"})
    timed = {"loss": None, "seconds": {"cpu": {"forward": 1.0, "backward": 2.5}}}
    live.end_run(Job("lora", "timing", 0, 1e-3, 4), timed)
    assert screen.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "2 of 6 runs are there already.",
        "3 of 6, about 3 min left: final/lisa/seed-0: failed: no [good]",
        "4 of 6, about 2 h 13 min left: timing/lora/round-0: 3.5 CPU seconds a step",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_runs_of_a_search_before_the_others(terminal: bool) -> None:
    """Their bars come and go before that of all runs is there, and their time is none of the others'."""
    seconds = iter([5000.0, 5060.0])
    screen = Console(force_terminal=terminal, file=io.StringIO(), width=100)
    live = LiveBenchmark(screen, now=lambda: next(seconds))
    tried = Job("recipe-1", "rung", 1000, 1e-3, 4)
    live.step(tried, 1, 4, 1.25)
    live.end_run(tried, {"error": "none"})
    live.begin(2, 0)
    live.more(1)
    live.end_run(Job("lisa", "final", 0, 1e-3, 4), {"error": "none"})
    live.end()
    [every] = live._bar.tasks
    assert (every.description, every.completed, every.total) == ("all runs", 1, 3)
    if not terminal:
        assert "1 of 3, about 2 min left: final/lisa" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_commented_example_of_a_suite_is_written(given: list[Any], tmp_path: Path) -> None:
    """With every key there is; what it says is the default can be taken as it is."""
    path = tmp_path / "my.yaml"
    assert f"Written: {path}" in invoke("--write-suite", str(path))
    assert given == [], "and nothing is run"
    keys = yaml.safe_load(path.read_text())
    assert keys.keys() == Suite.model_fields.keys()
    own = {"methods", "match", "options", "recipes"}
    for key, field in Suite.model_fields.items():
        assert key in own or keys[key] == field.get_default(call_default_factory=True), key
    invoke("--suite", str(path))
    assert given[0][0].recipes["best-lisa"].tries == 18
    given[0][0].check()
    with pytest.raises(
        ConfigError, match="--write-suite must name a new file, but .*my.yaml is there already"
    ):
        invoke("--write-suite", str(path))


def test_a_search_for_recipes_needs_a_suite(given: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A search for recipes needs --suite"):
        invoke("recipes", "--output", str(tmp_path / "new"))
    invoke("--write-suite", str(tmp_path / "my.yaml"))
    invoke("recipes", "--suite", str(tmp_path / "my.yaml"), "--jobs", "2", "--output", str(tmp_path / "new"))
    assert given[0][0].match == "both" and given[0][1:] == (tmp_path / "new", 2)


def test_the_command_imports_no_trainer() -> None:
    """Its help, and reports, need none of what takes seconds to import and is an extra."""
    code = (
        "import sys, layersample_benchmarks.side_by_side.command, layersample_benchmarks.side_by_side.report\n"
        "print([name for name in ('trl', 'peft', 'datasets', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
