"""Runs a suite, and goes on from where a stopped one was: what each method is given, its rate, and then all seeds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from itertools import zip_longest
from pathlib import Path

from layersample.errors import ConfigError

from .analysis import analyze
from .entries import MethodEntry
from .jobs import Job
from .matching import Matching
from .pool import BenchmarkProgress, Pool
from .power_words import power_beforehand
from .rates import choose_rate, plan_search, read_losses, read_runoffs
from .results import Results
from .suite import Suite


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    progress: BenchmarkProgress | None = None,
    keep_workers: bool = True,
) -> Results:
    """Run what of a suite hasn't been run yet.

    First what each method takes, where time or memory is matched. Then each method's learning rates, on the
    validation split, and more of them where the best is the lowest or highest; then the best of each, with every
    seed. A run that fails is kept with its error, and the others go on.

    Args:
        suite: What to run.
        folder: Where the results are.
        jobs: Runs at a time; those that measure time are alone in any case.
        command: What was typed, for the report.
        progress: Shows them.
        keep_workers: Whether runs share a process that has imported what they need, and fork from it. The numbers are
            the same without, to the bit.

    Raises:
        ConfigError: If the suite or the folder can't be used; nothing has been run then.
    """
    threads = threads_of(suite, jobs)
    suite.check()
    suite.check_data()
    with closing(Results(folder, suite).open(command)) as results:
        with closing(Pool(results, threads, jobs, progress, keep_workers=keep_workers)) as pool:
            _Run(suite, results, pool, progress).all()
    return results


class _Run:
    """The stages of a benchmark, each of which follows from what the ones before it have stored."""

    def __init__(
        self, suite: Suite, results: Results, pool: Pool, progress: BenchmarkProgress | None
    ) -> None:
        self._suite = suite
        self._results = results
        self._pool = pool
        self._progress = progress
        self._matching = Matching(suite, results)

    def all(self) -> None:
        """Do all of them."""
        timings, searches = self._matching.timing_jobs(), self._searches(planned=True)
        runs = len(timings) + len(searches) + self._final_runs(self._suite.entries)
        if self._progress is not None:
            tried = sum(line["stage"] in ("search", "runoff") for line in self._results.lines())
            done = sum(self._results.get(job) is not None for job in [*timings, *self._finals()])
            stored = self._results.lines()
            measured = {x["method"] for x in self._results.all_lines() if x["stage"] == "final"}
            self._progress.say(
                power_beforehand(self._suite, analyze(self._suite, stored) if stored else None, measured)
            )
            self._progress.begin(runs + tried, done + tried)
        self._match()
        searches = self._searches()
        while searches:
            self._pool.run(searches)
            searches = self._searches()
            self._more(len(searches))
        self._pool.run(self._finals())

    def _match(self) -> None:
        """Find out what each method may use; the rows that can't be matched say why."""
        matching, wanted = self._matching, len(self._searches(planned=True))
        matching.run(self._pool, self._more)
        left_out = [entry for entry in self._suite.entries if matching.given(entry) is None]
        self._more(len(self._searches()) - wanted - self._final_runs(left_out))
        if self._progress is not None:
            for entry in left_out:
                self._progress.say(f"{entry.name}: {matching.why_not(entry)}")

    def _final_runs(self, entries: Iterable[MethodEntry]) -> int:
        return sum(len(self._suite.seeds_of(entry)) for entry in entries)

    def _more(self, runs: int) -> None:
        if self._progress is not None and runs:
            self._progress.more(runs)

    def _searches(self, *, planned: bool = False) -> list[Job]:
        """The runs that try learning rates, of those that haven't been run yet; ``planned``: of all rows."""
        jobs, lines = [], self._results.lines()
        for entry in self._suite.entries:
            given = self._matching.given(entry)
            if given is None and not planned:
                continue
            losses = read_losses(lines, entry.name)
            search = plan_search(
                self._suite.rates(entry),
                losses,
                read_runoffs(lines, entry.name),
                extensions=self._suite.search_extensions,
                seeds=self._suite.search_seeds,
            )
            if len(search.rates) == 1:
                continue
            untried = [rate for rate in search.rates if rate not in losses]
            jobs += [self._suite.search_job(entry, rate, given) for rate in untried]
            if not untried and len(search.finalists) > 1:
                more = [
                    job for rate in search.finalists for job in self._suite.runoff_jobs(entry, rate, given)
                ]
                jobs += [job for job in more if self._results.get(job) is None]
        return jobs

    def _finals(self) -> list[Job]:
        """The runs of all methods that have a rate, seed by seed: one that is stopped early has the same of each."""
        chosen, lines = [], self._results.lines()
        for entry in self._suite.entries:
            given = self._matching.given(entry)
            losses, runoffs = read_losses(lines, entry.name), read_runoffs(lines, entry.name)
            rate = choose_rate(self._suite.rates(entry), losses, runoffs)
            if rate is not None and given is not None:
                chosen.append(self._suite.final_jobs(entry, rate, given))
        return [job for seed in zip_longest(*chosen) for job in seed if job is not None]


def threads_of(suite: Suite, jobs: int) -> int:
    """Threads of a run, where some run at a time.

    Raises:
        ConfigError: If ``jobs`` is none.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, but got {jobs}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return suite.threads or max(1, cores // jobs)
