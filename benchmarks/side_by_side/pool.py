"""The processes that do a benchmark's runs, some at a time; they end with this one."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from itertools import count
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from .jobs import Job
from .results import Results


class BenchmarkProgress(Protocol):
    """Shows all runs of a benchmark."""

    def begin(self, runs: int, done: int) -> None:
        """The runs there are, and how many were done before."""

    def step(self, job: Job, step: int, steps: int, loss: float) -> None:
        """A run has done a step."""

    def end_run(self, job: Job, measured: dict[str, Any]) -> None:
        """A run has ended, well or not."""

    def more(self, runs: int) -> None:
        """There are more runs than was said, or, below zero, fewer."""

    def say(self, text: str) -> None:
        """Something that isn't a run has been found."""


class Pool:
    """Does jobs, some at a time, and keeps what they measure.

    Args:
        results: Where it is kept.
        threads: Threads of a run.
        jobs: Runs at a time.
        progress: Shows them.
        keep_workers: Whether a worker does one run after the other; else each has a worker of its own.

    Raises:
        ConfigError: If what is stored was run with other threads.
    """

    def __init__(
        self,
        results: Results,
        threads: int,
        jobs: int,
        progress: BenchmarkProgress | None,
        *,
        keep_workers: bool = True,
    ) -> None:
        results.check_threads(threads)
        if progress is not None and (others := results.other_machines(threads)):
            progress.say(others)
        self._results = results
        self._threads = threads
        self._jobs = jobs
        self._progress = progress
        self._keep_workers = keep_workers
        self._lock = Lock()
        self._starting = Lock()
        self._stopped = Event()
        self._numbers = count(1)
        self._workers: set[Worker] = set()
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def run(self, jobs: Iterable[Job], *, alone: bool = False) -> None:
        """Do the jobs that aren't stored yet; ``alone``: one at a time, whatever else was asked for."""
        waiting = [job for job in jobs if self._results.get(job) is None]
        at_once = 1 if alone else self._jobs
        with ThreadPoolExecutor(at_once) as executor:
            futures = [executor.submit(self._run, job, at_once) for job in waiting]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self.close()
                for future in futures:
                    future.cancel()
                raise

    def close(self) -> None:
        """End all workers; no more are started."""
        with self._starting:
            self._stopped.set()
        for worker in list(self._workers):
            worker.end()

    def _run(self, job: Job, at_once: int) -> None:
        if self._stopped.is_set():
            return
        started = time.time()
        measured = self._measure(job)
        if measured is None or self._stopped.is_set():  # it was ended, which says nothing of the method
            return
        run = {
            "run_seconds": round(time.time() - started, 1),
            "runs_at_once": at_once,
            "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        }
        self._results.add(job, {**measured, **run})
        if self._progress is not None:
            with self._lock:
                self._progress.end_run(job, measured)

    def _measure(self, job: Job) -> dict[str, Any] | None:
        folder = self._results.folder / "logs"
        log = folder / f"{job.key.replace('/', '.')}.log"
        log.unlink(missing_ok=True)
        worker = self._take_worker(folder)
        if worker is None:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            given = {
                "suite": self._results.suite.model_dump(mode="json"),
                "job": asdict(job),
                "threads": self._threads,
                "log": str(log.absolute()),
                "scratch": scratch,
            }
            measured, code = worker.do(given, lambda event: self._show(job, event))
        if self._keep_workers and worker.lives:
            self._idle.put(worker)
        else:
            worker.end()
            self._workers.discard(worker)
        return measured or {"error": _ending(code, log if log.exists() else worker.log)}

    def _take_worker(self, logs: Path) -> Worker | None:
        """One that has nothing to do, or a new one; ``None`` where all are being ended."""
        with self._starting:
            if self._stopped.is_set():
                return None
            try:
                return self._idle.get_nowait()
            except queue.Empty:
                worker = Worker(logs / f"worker-{next(self._numbers)}.log", self._threads)
                self._workers.add(worker)
                return worker

    def _show(self, job: Job, event: dict[str, Any]) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress.step(job, event["step"], event["steps"], event["loss"])


class Worker:
    """A process that does one job after the other (see :mod:`.worker`).

    Args:
        log: Where what it says itself goes; what an earlier one has said there is gone.
        threads: Threads of a run.
    """

    def __init__(self, log: Path, threads: int) -> None:
        self.log = log
        self._busy = Lock()
        with open(log, "w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "layersample_benchmarks.side_by_side.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # In a session of its own: Ctrl-C comes to this process, which then ends the others.
                start_new_session=True,
                # Asking CUDA itself whether there is a GPU would leave it unusable in a fork.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                },
            )

    @property
    def lives(self) -> bool:
        """Whether it can do another job."""
        return self._process.poll() is None

    def do(
        self, given: dict[str, Any], show: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any] | None, int]:
        """Tell it a job, and take what it says until that has ended.

        Args:
            given: The suite, the job and where its log goes.
            show: Told of each step.

        Returns:
            What was measured, or the error; ``None`` where it could say neither. And the exit code of the run.
        """
        with self._busy:
            return self._do(given, show)

    def _do(
        self, given: dict[str, Any], show: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any] | None, int]:
        measured: dict[str, Any] | None = None
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None, self._process.wait()  # it ended at once, and its log says why
        for text in self._process.stdout:
            try:
                event = json.loads(text)
            except ValueError:  # a blank line, or one that a killed run hasn't ended
                continue
            if "step" in event:
                show(event)
            elif "result" in event:
                measured = event["result"]
            elif "error" in event:
                measured = {"error": event["error"]}
            elif "ended" in event:
                return measured, event["ended"]
        return measured, self._process.wait()

    def end(self) -> None:
        """End it, and the run that it does."""
        self._process.terminate()
        self._process.wait()
        with self._busy:  # the thread that reads what it says has come to the end of that
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None and not stream.closed:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass


def _ending(code: int, log: Path) -> str:
    """Why a process ended that could say nothing itself."""
    if code == -signal.SIGKILL:
        return "The process was killed (SIGKILL), most likely because memory ran out."
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    last = text.strip().splitlines()[-1:]
    return f"The process ended with code {code}: {last[0] if last else 'it said nothing'}"
