"""Runs a suite: each run in a process of its own, several at a time, and on from where a killed one was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from layersample.errors import ConfigError

from .rates import choose_rate, find_rates, read_losses
from .results import Results
from .suite import Job, Suite


class BenchmarkProgress(Protocol):
    """Shows all runs of a benchmark."""

    def begin(self, runs: int, done: int) -> None:
        """The runs there are, and how many were done before."""

    def step(self, job: Job, step: int, steps: int, loss: float) -> None:
        """A run has done a step."""

    def end_run(self, job: Job, measured: dict[str, Any]) -> None:
        """A run has ended, well or not."""

    def more(self, runs: int) -> None:
        """There are more runs than was said."""


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    progress: BenchmarkProgress | None = None,
) -> Results:
    """Run what of a suite hasn't been run yet.

    First each method's learning rates, on the validation split, and more of them where the best is the lowest or
    highest; then the best of each, with every seed. A run that fails is kept with its error, and the others go on.

    Args:
        suite: What to run.
        folder: Where the results are.
        jobs: Runs at a time.
        command: What was typed, for the report.
        progress: Shows them.

    Raises:
        ConfigError: If the suite or the folder can't be used; nothing has been run then.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, but got {jobs}.")
    suite.check()
    suite.check_data()
    with closing(Results(folder, suite).open(command)) as results:
        _run_all(suite, results, jobs, progress)
    return results


def _run_all(suite: Suite, results: Results, jobs: int, progress: BenchmarkProgress | None) -> None:
    pool = _Pool(results, suite.threads or max(1, _cores() // jobs), jobs, progress)
    searches = _searches(suite, results)
    if progress is not None:
        tried = sum(line["stage"] == "search" for line in results.lines())
        finals = [job for seed in _finals(suite, results) for job in seed]
        done = tried + sum(results.get(job) is not None for job in finals)
        progress.begin(tried + len(searches) + len(suite.entries) * len(suite.seeds), done)
    while searches:
        pool.run(searches)
        searches = _searches(suite, results)
        if progress is not None:
            progress.more(len(searches))
    pool.run(job for seed in _finals(suite, results) for job in seed)


def _searches(suite: Suite, results: Results) -> list[Job]:
    """The runs that try learning rates, of those that haven't been run yet."""
    jobs, lines = [], results.lines()
    for entry in suite.entries:
        losses = read_losses(lines, entry.name)
        rates = find_rates(suite.rates(entry), losses, suite.search_extensions)
        if len(rates) > 1:
            jobs += [suite.search_job(entry, rate) for rate in rates if rate not in losses]
    return jobs


def _finals(suite: Suite, results: Results) -> Iterable[tuple[Job, ...]]:
    """The runs of all methods that have a rate, seed by seed: one that is stopped early has the same of each."""
    chosen, lines = [], results.lines()
    for entry in suite.entries:
        rate = choose_rate(suite.rates(entry), read_losses(lines, entry.name))
        if rate is not None:
            chosen.append(suite.final_jobs(entry, rate))
    return zip(*chosen, strict=True)


class _Pool:
    """Processes, some at a time; they end with this one."""

    def __init__(
        self,
        results: Results,
        threads: int,
        jobs: int,
        progress: BenchmarkProgress | None,
    ) -> None:
        self._results = results
        self._threads = threads
        self._jobs = jobs
        self._progress = progress
        self._lock = Lock()
        self._stopped = Event()
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, jobs: Iterable[Job]) -> None:
        """Run those that aren't stored yet."""
        waiting = [job for job in jobs if self._results.get(job) is None]
        with ThreadPoolExecutor(self._jobs) as executor:
            futures = [executor.submit(self._run, job) for job in waiting]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stop()
                for future in futures:
                    future.cancel()
                raise

    def _run(self, job: Job) -> None:
        if self._stopped.is_set():
            return
        started = time.time()
        measured = self._measure(job)
        if self._stopped.is_set():  # it was ended, which says nothing of the method
            return
        self._results.add(job, {**measured, "run_seconds": round(time.time() - started, 1)})
        if self._progress is not None:
            with self._lock:
                self._progress.end_run(job, measured)

    def _measure(self, job: Job) -> dict[str, Any]:
        suite = self._results.suite.model_dump(mode="json")
        given = {"suite": suite, "job": asdict(job), "threads": self._threads}
        log = self._results.folder / "logs" / f"{job.key.replace('/', '.')}.log"
        with open(log, "w", encoding="utf-8") as errors, tempfile.TemporaryDirectory() as scratch:
            process = subprocess.Popen(
                [sys.executable, "-m", "layersample_benchmarks.side_by_side.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # In a session of its own: Ctrl-C comes to this process, which then ends the others.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads), "TMPDIR": scratch},
            )
            self._running.add(process)
            with process:
                measured = self._listen(process, job, given)
            self._running.discard(process)
        return measured or {"error": _ending(process.returncode, log)}

    def _listen(
        self, process: subprocess.Popen[str], job: Job, given: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Tell a process its job, and take what it says until it ends."""
        measured: dict[str, Any] | None = None
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None  # it ended at once, and its log says why
        for text in process.stdout:
            event = json.loads(text)
            if "step" in event and self._progress is not None:
                with self._lock:
                    self._progress.step(job, event["step"], event["steps"], event["loss"])
            elif "result" in event:
                measured = event["result"]
            elif "error" in event:
                measured = {"error": event["error"]}
        return measured

    def _stop(self) -> None:
        self._stopped.set()
        for process in list(self._running):
            process.terminate()


def _ending(code: int, log: Path) -> str:
    """Why a process ended that could say nothing itself."""
    if code == -signal.SIGKILL:
        return "The process was killed (SIGKILL), most likely because memory ran out."
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"The process ended with code {code}: {last[0] if last else 'it said nothing'}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
