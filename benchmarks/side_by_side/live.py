"""How a benchmark that runs looks on a terminal, or in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Task, TaskID

from layersample.cli.consoles import plain
from layersample.cli.display import make_bar

from .jobs import Job
from .stored_lines import last_loss, step_seconds


class LiveBenchmark:
    """A bar for all runs and one for each that goes on; without a terminal, a line for each run that ends.

    Args:
        console: Where they are shown.
        now: Gives seconds, from whatever beginning.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._started = 0.0
        self._ended = 0
        self._runs: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._bar = make_bar(console)

    def begin(self, runs: int, done: int) -> None:
        """Show the bar of all runs."""
        if done:
            self._console.print(f"{done} of {runs} runs are there already.", highlight=False)
        self._started, self._ended = self._now(), 0  # a search before them isn't among them
        self._runs = self._bar.add_task("all runs", total=runs, completed=done, status="")
        self._bar.start()

    def step(self, job: Job, step: int, steps: int, loss: float) -> None:
        """Move the bar of a run."""
        if job.key not in self._tasks:
            self._tasks[job.key] = self._bar.add_task(job.key, total=steps, status="")
        self._bar.update(self._tasks[job.key], completed=step, status=f"loss {loss:.3f}")

    def end_run(self, job: Job, measured: dict[str, Any]) -> None:
        """Take the bar of a run away, and say how it ended."""
        if job.key in self._tasks:
            self._bar.remove_task(self._tasks.pop(job.key))
        if "error" in measured:
            words = f"[red]failed:[/] {plain(measured['error'])}"
        else:
            words = _outcome(job, measured)
        if "lm_eval_error" in measured:
            words += f"; [red]the harness failed:[/] {plain(measured['lm_eval_error'])}"
        self._ended += 1
        if self._runs is not None:
            self._bar.advance(self._runs)
        self._console.print(f"{self._place()}{plain(job.key)}: {words}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Say what was found between two runs."""
        self._console.print(plain(text), highlight=False, soft_wrap=True)

    def _place(self) -> str:
        """Which run of how many has ended, and how long the others will take: what bars show on a terminal."""
        if self._runs is None or not self._bar.disable:
            return ""
        task = self._all_runs
        left = max(0, int((task.total or 0) - task.completed))  # rates may change, and final runs with them
        seconds = left * (self._now() - self._started) / self._ended
        when = f", about {_duration(seconds)} left" if left else ""
        return f"{int(task.completed)} of {int(task.total or 0)}{when}: "

    def more(self, runs: int) -> None:
        """Make room for them in the bar of all runs."""
        if self._runs is not None:
            self._bar.update(self._runs, total=(self._all_runs.total or 0) + runs)

    @property
    def _all_runs(self) -> Task:
        """The bar of all runs, by its id: those of ended runs are gone from among the bars."""
        return next(task for task in self._bar.tasks if task.id == self._runs)

    def end(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


def _outcome(job: Job, measured: dict[str, Any]) -> str:
    if measured["loss"] is not None:
        return f"held-out loss {last_loss(measured):.4f}"
    if job.stage == "peak":
        return f"peak {measured['peak_bytes']['tensors']['total'] / 2**20:,.0f} MiB"
    return f"{step_seconds(measured, 'cpu'):.3g} CPU seconds a step"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
