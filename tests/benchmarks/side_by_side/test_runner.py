"""Which runs are started, in which order, and what becomes of those that fail; without processes but in one test."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side import pool
from layersample_benchmarks.side_by_side import results as results_module
from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.report import write_report
from layersample_benchmarks.side_by_side.results import read_results
from layersample_benchmarks.side_by_side.runner import run_suite
from layersample_benchmarks.side_by_side.suite import Suite

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")

Measure = Callable[[Job], dict[str, Any]]


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measure], list[str]]:
    """Replace the processes by a function; the list names the runs in their order."""

    def install(measure: Measure) -> list[str]:
        started: list[str] = []

        def run(self: Any, job: Job) -> dict[str, Any]:
            started.append(job.key)
            return measure(job)

        monkeypatch.setattr(pool.Pool, "_measure", run)
        return started

    return install


def suite(**more: Any) -> Suite:
    keys = {
        "methods": ["lisa", "lora"],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "search_extensions": 0,
        "threads": 1,
    }
    return Suite(**{**keys, **more})


def test_rates_are_searched_first_and_the_best_is_used(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    best = {"lisa": 1e-2, "lora": 1e-3}
    started = in_place(lambda job: made_up(job, 1.0 if job.learning_rate == best[job.row] else 2.0))
    results = run_suite(suite(), tmp_path)
    assert started == [
        *(
            "search/lisa/rate-0.001",
            "search/lisa/rate-0.01",
            "search/lora/rate-0.001",
            "search/lora/rate-0.01",
        ),
        *("final/lisa/seed-0", "final/lora/seed-0", "final/lisa/seed-1", "final/lora/seed-1"),
    ]
    finals = [line for line in results.lines() if line["stage"] == "final"]
    assert {line["method"]: line["learning_rate"] for line in finals} == best


def test_rows_with_more_seeds_go_on_when_the_others_have_ended(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    started = in_place(lambda job: made_up(job, 1.0))
    more = [{"name": "lisa", "seeds": 3}, "lora"]
    run_suite(suite(methods=more, learning_rates=[1e-3]), tmp_path)
    runs = [f"{name}/seed-{seed}" for seed in (0, 1) for name in ("lisa", "lora")]
    assert started == [f"final/{run}" for run in (*runs, "lisa/seed-2")]


def test_one_rate_needs_no_search(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    started = in_place(lambda job: made_up(job, 1.0))
    run_suite(suite(learning_rates=[1e-3]), tmp_path)
    assert all(key.startswith("final/") for key in started) and len(started) == 4


def test_a_method_that_fails_is_a_row_that_says_why_and_the_others_go_on(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    def measure(job: Job) -> dict[str, Any]:
        return {"error": "NonFiniteLossError: nan"} if job.row == "lora" else made_up(job, 1.0)

    in_place(measure)
    results = run_suite(suite(), tmp_path, jobs=2)
    lines = results.lines()
    assert {line["method"]: line.get("error") for line in lines} == {
        "lisa": None,
        "lora": "NonFiniteLossError: nan",
    }
    assert sum(line["stage"] == "final" for line in lines) == 2


def test_a_rate_that_fails_leaves_the_others(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    in_place(lambda job: {"error": "nan"} if job.learning_rate == 1e-2 else made_up(job, 1.0))
    results = run_suite(suite(), tmp_path)
    assert [line["learning_rate"] for line in results.lines() if line["stage"] == "final"] == [1e-3] * 4


def test_a_benchmark_that_was_stopped_goes_on_where_it_was(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    def stop(job: Job) -> dict[str, Any]:
        if job.key == "final/lora/seed-0":
            raise KeyboardInterrupt
        return dict(made_up(job, 1.0))

    first = in_place(stop)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite(), tmp_path)
    assert "final/lora/seed-0" in first
    stored = [line["key"] for line in read_results(tmp_path)[1]]
    second = in_place(lambda job: made_up(job, 1.0))
    results = run_suite(suite(), tmp_path)
    assert len(stored) >= 5 and "final/lora/seed-0" in second
    assert not set(stored) & set(second)
    assert len(results.lines()) == 8


def test_failed_runs_are_tried_again(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    in_place(lambda job: {"error": "disk full"})
    run_suite(suite(learning_rates=[1e-3]), tmp_path)
    assert all("error" in line for line in read_results(tmp_path)[1])
    started = in_place(lambda job: made_up(job, 1.0))
    run_suite(suite(learning_rates=[1e-3]), tmp_path)
    assert len(started) == 4
    assert not any("error" in line for line in read_results(tmp_path)[1])


def test_several_at_a_time(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def measure(job: Job) -> dict[str, Any]:
        meeting.wait()  # two runs must be under way at once
        return dict(made_up(job, 1.0))

    in_place(measure)
    assert len(run_suite(suite(), tmp_path, jobs=2).lines()) == 8


def test_bad_input_comes_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs must be at least 1, but got 0"):
        run_suite(suite(), tmp_path / "new", jobs=0)
    with pytest.raises(ConfigError, match="Unknown method 'liza'"):
        run_suite(suite(methods=["liza"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_runs_are_processes_of_their_own(
    make_tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that raises, one that is killed and one that ends well behind them, with the same losses as in this process.

    All three come from one worker: what a run does to its process ends with it.
    """
    from layersample_benchmarks.side_by_side.training import run_job

    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import os, signal\n"
        "from layersample_benchmarks.methods.method import register_baseline, sample_layers\n"
        "@register_baseline('raises')\n"
        "def raises(model, config):\n"
        "    'Raise.'\n"
        "    print('said on standard output')\n"
        "    raise ValueError('no good')\n"
        "@register_baseline('killed')\n"
        "def killed(model, config):\n"
        "    'Be killed.'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tiny = make_tiny(["raises", "killed", "lisa"], seeds=[0], plugin=plugin)
    seen: list[str] = []
    workers: list[pool.Worker] = []

    class Worker(pool.Worker):  # type: ignore[misc]
        def __init__(self, log: Path, threads: int) -> None:
            super().__init__(log, threads)
            workers.append(self)

    monkeypatch.setattr(pool, "Worker", Worker)

    class Progress:
        def begin(self, runs: int, done: int) -> None:
            seen.append(f"{done} of {runs}")

        def step(self, job: Job, step: int, steps: int, loss: float) -> None:
            seen.append(f"{job.row} {step}/{steps}")

        def end_run(self, job: Job, measured: dict[str, Any]) -> None:
            seen.append(f"{job.row} ended")

        def say(self, text: str) -> None:
            seen.append(text)

        def more(self, runs: int) -> None:
            raise AssertionError("there are no more runs than was said")

    results = run_suite(tiny, tmp_path / "out", progress=Progress())
    assert len(workers) == 1 and not workers[0].lives
    by_name = {line["method"]: line for line in results.lines()}
    assert by_name["raises"]["error"] == "ValueError: no good"
    assert "most likely because memory ran out" in by_name["killed"]["error"]
    assert "With 1 seed no difference is tested" in seen[0]
    assert {"0 of 3", "lisa 1/4", "lisa 4/4", "lisa ended", "killed ended"} <= set(seen)
    assert "said on standard output" in (tmp_path / "out" / "logs" / "final.raises.seed-0.log").read_text()
    here = run_job(tiny, tiny.final_jobs(tiny.entries[2], 1e-2)[0], lambda step: None)
    assert by_name["lisa"]["training_loss"] == here["training_loss"]
    assert by_name["lisa"]["loss"] == here["loss"]
    assert by_name["lisa"]["environment"]["threads"] == 1


def test_a_run_ends_with_the_benchmark(make_tiny: Callable[..., Suite], tmp_path: Path) -> None:
    """Even where the benchmark is killed and can tell nobody."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import os, pathlib, time\n"
        "from layersample_benchmarks.methods.method import register_baseline\n"
        "@register_baseline('waits')\n"
        "def waits(model, config):\n"
        "    'Wait.'\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    tiny = make_tiny(["waits"], seeds=[0], plugin=plugin)
    code = (
        "import sys; from pathlib import Path; from layersample_benchmarks.side_by_side.suite import Suite\n"
        "from layersample_benchmarks.side_by_side.runner import run_suite\n"
        "run_suite(Suite.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tiny.model_dump_json(), str(tmp_path / "out")])
    try:
        worker = int(_wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    finally:
        parent.kill()
        parent.wait()
    _wait_for(lambda: not _runs(worker))


def _wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_what_a_process_that_said_nothing_ended_with(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\nImportError: no torch\n")
    assert pool._ending(1, log) == "The process ended with code 1: ImportError: no torch"
    log.write_text("")
    assert "it said nothing" in pool._ending(3, log)
    assert "SIGKILL" in pool._ending(-signal.SIGKILL, log)


def test_runs_of_other_threads_are_never_mixed(
    in_place: Callable[[Measure], list[str]],
    made_up: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Threads follow from cores and jobs, where the suite doesn't say."""
    seen = in_place(lambda job: made_up(job, 1.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    run_suite(suite(threads=None), tmp_path, jobs=2)
    before = len(seen)
    with pytest.raises(
        ConfigError, match="holds runs of 1 threads each, but these would have 2: give as many"
    ):
        run_suite(suite(threads=None, seeds=[0, 1, 2]), tmp_path)
    assert len(seen) == before
    run_suite(suite(threads=None, seeds=[0, 1, 2]), tmp_path, jobs=2)
    assert len(seen) == before + 2


def test_runs_of_another_machine_are_said_before_more_are_added(
    in_place: Callable[[Measure], list[str]],
    made_up: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A virtual machine's processor has one name in several generations: only its instructions tell them apart."""
    said: list[str] = []

    class Progress:
        def begin(self, runs: int, done: int) -> None: ...
        def more(self, runs: int) -> None: ...
        def end_run(self, job: Job, measured: dict[str, Any]) -> None: ...
        def say(self, text: str) -> None:
            said.append(text)

    own: dict[str, Any] = {
        "processor": "AMD EPYC",
        "gpu": None,
        "threads": 1,
        "python": "3.11",
        "versions": {},
        "git": None,
    }
    fast, slow = {**own, "instructions": "AVX512 with bf16"}, {**own, "instructions": "AVX2"}
    in_place(lambda job: made_up(job, 1.0, environment=fast))
    monkeypatch.setattr(results_module, "environment", lambda: fast)
    run_suite(suite(), tmp_path, progress=Progress())
    run_suite(suite(), tmp_path, progress=Progress())
    assert not any("another machine" in text for text in said)
    monkeypatch.setattr(results_module, "environment", lambda: slow)
    run_suite(suite(), tmp_path, progress=Progress())
    assert any(
        "another machine (AMD EPYC, AVX512 with bf16, 1 thread) than this one (AMD EPYC, AVX2, 1 thread)"
        in text
        for text in said
    )


def test_timings_of_other_steps_are_made_anew(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    """At equal steps the number and length of timings may change; none of before is counted then."""
    seen = in_place(lambda job: made_up(job, 1.0))

    def timings(**more: Any) -> list[int]:
        run_suite(suite(methods=["lisa"], **more), tmp_path)
        row = analyze(*read_results(tmp_path)).row("lisa")
        return [len(line["training_loss"]) for line in row.timings]

    assert timings(timing_rounds=2, timing_steps=11) == [11, 11]
    assert timings(timing_rounds=1, timing_steps=11) == [11]
    before = len(seen)
    assert timings(timing_rounds=3, timing_steps=5) == [5, 5, 5]
    assert len(seen) == before + 3


def test_a_worker_s_log_says_nothing_of_an_earlier_one(
    make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-1.log").write_text("of last week\n")
    monkeypatch.setattr(pool.sys, "executable", shutil.which("false"))
    results = run_suite(make_tiny(["lisa"], seeds=[0]), tmp_path / "out")
    assert [line["error"] for line in results.lines()] == ["The process ended with code 1: it said nothing"]


def test_a_run_that_is_killed_while_it_says_its_result_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "worker"
    said.write_text('#!/bin/sh\nread job\nprintf \'\\n{"result": {"lo\'\nprintf \'\\n{"ended": -9}\\n\'\n')
    said.chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(said))
    worker = pool.Worker(tmp_path / "log", 1)
    assert worker.do({}, lambda event: None) == (None, -9)
    worker.end()


def test_a_best_rate_at_the_edge_is_searched_beyond(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    best = {"lisa": 1.0, "lora": 1e-5}  # two and three more than the grid has
    started = in_place(lambda job: made_up(job, 1 + abs(math.log(job.learning_rate / best[job.row]))))
    results = run_suite(suite(search_extensions=2), tmp_path)
    searches = [key for key in started if key.startswith("search")]
    assert searches[4:] == ["search/lisa/rate-0.1", "search/lora/rate-0.0001"] + [
        "search/lisa/rate-1",
        "search/lora/rate-1e-05",
    ]
    finals = {line["method"]: line["learning_rate"] for line in results.lines() if line["stage"] == "final"}
    assert finals == best
    again = in_place(lambda job: made_up(job, 1.0))
    run_suite(suite(search_extensions=2), tmp_path)
    assert again == []


def test_the_best_two_rates_are_tried_with_more_seeds(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    """The first seed is lucky with the highest rate, which the others are not."""
    losses = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.8}

    def measure(job: Job) -> dict[str, Any]:
        lucky = job.stage == "search" and job.learning_rate == 1e-2
        measured: dict[str, Any] = made_up(job, 1.0 if lucky else losses[job.learning_rate])
        return measured

    asked = suite(methods=["lisa"], learning_rates=[*losses], seeds=[5, 6], search_seeds=3)
    started = in_place(measure)
    results = run_suite(asked, tmp_path)
    assert started[3:7] == [
        *("runoff/lisa/rate-0.01/seed-6", "runoff/lisa/rate-0.01/seed-7"),
        *("runoff/lisa/rate-0.001/seed-6", "runoff/lisa/rate-0.001/seed-7"),
    ]
    finals = [line for line in results.lines() if line["stage"] == "final"]
    assert [line["learning_rate"] for line in finals] == [1e-3, 1e-3]
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "0.001: 2.000 (3 seeds); 0.01: 2.200 (3 seeds)" in page and "with 2 more seeds each" in page
    again = in_place(measure)
    run_suite(asked, tmp_path)
    assert again == []


def test_rates_may_be_tried_with_seeds_of_their_own(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    started = in_place(lambda job: made_up(job, 1.0 + job.learning_rate))
    results = run_suite(suite(methods=["lisa"], seeds=[0, 1], search_seed=7, search_seeds=2), tmp_path)
    seeds: dict[str, set[int]] = {}
    for line in results.lines():
        seeds.setdefault(line["stage"], set()).add(line["seed"])
    assert seeds == {"search": {7}, "runoff": {8}, "final": {0, 1}} and started
    with pytest.raises(
        ConfigError, match="search_seed must begin seeds of which none is measured, but 1 is among"
    ):
        suite(methods=["lisa"], seeds=[0, 1], search_seed=0, search_seeds=2).model_copy(
            update={"seeds": [1, 9]}
        ).check()


def test_rates_that_were_tried_with_other_seeds_are_not_taken_for_those_that_are_asked_for(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    in_place(lambda job: made_up(job, 1.0 + job.learning_rate))
    asked = suite(methods=["lisa"], seeds=[0], search_seed=7, search_seeds=2)
    run_suite(asked, tmp_path)
    for key, other in (("search_seed", 9), ("search_seed", None), ("search_seeds", 1), ("search_seeds", 3)):
        with pytest.raises(ConfigError, match=f"its {key} is {getattr(asked, key)}, but {other} is asked"):
            run_suite(asked.model_copy(update={key: other}), tmp_path)


def test_a_rate_at_the_edge_that_more_seeds_choose_is_searched_beyond(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    """On the first seed the best rate is in the middle; on the others it is one above the highest."""

    def measure(job: Job) -> dict[str, Any]:
        best = 2e-3 if job.seed == 5 else 0.1
        return dict(made_up(job, abs(math.log(job.learning_rate / best))))

    asked = suite(
        methods=["lisa"], learning_rates=[1e-4, 1e-3, 1e-2], seeds=[5], search_seeds=3, search_extensions=2
    )
    started = in_place(measure)
    run_suite(asked, tmp_path)
    assert "search/lisa/rate-0.1" in started and "runoff/lisa/rate-0.1/seed-7" in started
    shown = analyze(*read_results(tmp_path)).rows[0]
    assert shown.rate == 0.1 and not shown.at_edge
    again = in_place(measure)
    run_suite(asked, tmp_path)
    assert again == []


def test_a_final_run_of_a_rate_that_is_no_longer_the_best_is_run_again(
    in_place: Callable[[Measure], list[str]], made_up: Callable[..., Any], tmp_path: Path
) -> None:
    in_place(lambda job: made_up(job, 1 / job.learning_rate))
    run_suite(suite(methods=["lisa"], search_extensions=0), tmp_path)
    started = in_place(lambda job: made_up(job, 1 / job.learning_rate))
    results = run_suite(suite(methods=["lisa"], search_extensions=1), tmp_path)
    assert started == ["search/lisa/rate-0.1", "final/lisa/seed-0", "final/lisa/seed-1"]
    shown = analyze(*read_results(tmp_path)).rows[0]
    assert [run["learning_rate"] for run in shown.runs] == [0.1, 0.1]
    assert len(results.lines()) == 7, "those of the other rate are kept"
