"""What each method is given, so that all are compared at equal time, at equal memory, or at both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from layersample.config import TrainConfig
from layersample.errors import ConfigError

from .entries import MethodEntry
from .example_length import longest_example
from .jobs import Given, Job, Stage
from .memory_match import DoesNotFitError, MemoryPlanner
from .pool import Pool
from .results import Results
from .stored_lines import Line, clock_of, machine_of, once_seconds, seconds_of, step_seconds
from .suite import Suite
from .wording import exact_mib, part_of

# Steps beyond a whole run are thought to take its mean. Where there are many, a longer one is timed: what is done once
# in many steps, such as an SVD, may not have come yet.
_FURTHER = 1.1
_WHOLE_RUNS = 3
_COMPARABLE = {"num_active", "rank"}  # what a row may fix itself, and is then not chosen for it


@dataclass(frozen=True)
class Pace:
    """What a method takes, measured over runs with nothing of the benchmark beside them.

    Args:
        step: Seconds of a step, the mean.
        once: Seconds of what it does once: what its sampler measures first, and what its first step does besides.
        clock: ``"cpu"``, or ``"wall"`` where a GPU works.
        machine: Its processor, its GPU, and the threads of a run.
        each: Seconds of each step of a whole run, as far as one was timed: upper layers take less than lower ones.
    """

    step: float
    once: float
    clock: str
    machine: str
    each: tuple[float, ...] = ()

    def steps_in(self, seconds: float) -> int:
        """Whole steps that fit some seconds."""
        left = (seconds - self.once) * (1 + 1e-9)  # rounding must not take a step from the reference itself
        for count, step in enumerate(self.each):
            if step > left:
                return count
            left -= step
        return max(0, len(self.each) + math.floor(left / self.step))

    def seconds_of(self, steps: int) -> float:
        """Seconds of so many steps and of what is done once."""
        return seconds_of(steps, self.once, self.step, self.each)


class Matching:
    """Decides what the rows of a suite are given; each decision is stored, and later calls go by it.

    Args:
        suite: The suite.
        results: Where measurements and decisions are.
        data_of: The suite whose examples memory is planned for, where the decisions are for its runs; its own by
            default.
    """

    def __init__(self, suite: Suite, results: Results, data_of: Suite | None = None) -> None:
        self._suite = suite
        self._data_of = data_of or suite
        self._results = results
        steps = None if suite.matches_time else max(suite.steps, suite.search_steps)
        self._planner = MemoryPlanner(suite.model, steps, suite.attention)

    def run(self, pool: Pool, more: Callable[[int], None] = lambda runs: None) -> None:
        """Measure and decide what isn't decided yet; nothing where all have the same steps and no times are wanted.

        Args:
            pool: Does the runs, one at a time.
            more: Told how many more runs there are than was known, or, below zero, fewer.
        """
        peaks = self.peak_jobs()
        more(sum(self._results.get(job) is None for job in peaks))
        pool.run(peaks, alone=True)
        before = len(self.timing_jobs())
        self.fit_memory()
        timings = self.timing_jobs()
        more(len(timings) - before)
        pool.run(timings, alone=True)
        for _ in range(_WHOLE_RUNS):
            wholes = [job for job in self.whole_jobs() if self._results.get(job) is None]
            more(len(wholes))
            pool.run(wholes, alone=True)
        self.fit_time()

    def given(self, entry: MethodEntry) -> Given | None:
        """What a row is given; ``None`` where nothing is, or it isn't decided yet."""
        memory, time = self._decided(entry.name, "memory"), self._decided(entry.name, "time")
        if (self._suite.matches_memory and not _is_good(memory)) or (
            self._suite.matches_time and not _is_good(time)
        ):
            return None
        options = memory["options"] if memory else {}
        if time is None:
            return Given(self._suite.steps, self._suite.search_steps, options)
        return Given(time["steps"], time["search_steps"], options)

    def why_not(self, entry: MethodEntry) -> str:
        """Why a row is given nothing."""
        decided = (self._decided(entry.name, stage) for stage in ("memory", "time"))
        return next((str(x["error"]) for x in decided if x is not None and "error" in x), "not decided yet")

    def undecided(self) -> list[MethodEntry]:
        """The rows for which nothing has been decided yet."""
        stages = [
            stage
            for stage, wanted in (("memory", self._suite.matches_memory), ("time", self._suite.matches_time))
            if wanted
        ]
        return [
            entry
            for entry in self._suite.entries
            if any(self._decided(entry.name, stage) is None for stage in stages)
            and not any(_has_failed(self._decided(entry.name, stage)) for stage in stages)
        ]

    def peak_jobs(self) -> list[Job]:
        """Runs that measure the memory of what can't be planned, and then of the reference too."""
        if not self._suite.matches_memory:
            return []
        waiting = [entry for entry in self.undecided() if self._decided(entry.name, "memory") is None]
        measured = [entry for entry in waiting if not self._planner.can_plan(entry.definition)]
        rows = {entry.name: entry for entry in measured}
        if measured:
            rows |= {e.name: e for e in self._suite.entries if e.name == self._suite.match_to}
        return [self._suite.peak_job(entry) for entry in rows.values()]

    def fit_memory(self) -> None:
        """Decide what fits the reference's memory."""
        if not self._suite.matches_memory:
            return
        for entry in self.undecided():
            if self._decided(entry.name, "memory") is None:
                self._results.add_match(entry.name, "memory", self._fit(entry))

    def _fit(self, entry: MethodEntry) -> Line:
        suite, reference = self._suite, self._results.entry(self._suite.match_to)
        share = 1.0 if entry.name == reference.name else suite.memory_share
        try:
            planned = self._planner.can_plan(entry.definition)
            if planned and not self._planner.can_plan(reference.definition):
                return {
                    "error": f"Not matched in memory: that of {reference.name} can't be planned. Match to a method "
                    "that can: a sampler, or LoRA's adapters."
                }
            limit = int(share * (self._planned(reference) if planned else self._measured(reference.name)))
            if planned and entry.name != reference.name:
                own = frozenset(_COMPARABLE & entry.options.keys())
                fit = self._planner.fit(entry.definition, self._as_long_as_data(entry), limit, own)
                options, taken = fit.options, fit.bytes
            else:
                options, taken = {}, limit if entry.name == reference.name else self._measured(entry.name)
            if taken > limit:
                raise DoesNotFitError(f"takes {exact_mib(taken)}, and nothing of it can be chosen")
        except DoesNotFitError as error:
            return {
                "error": f"Not matched in memory: it {error}, but {part_of(share)}{reference.name}'s peak is "
                f"{exact_mib(limit)}."
            }
        except ConfigError as error:
            return {"error": f"Not matched in memory: {error}"}
        return {"options": options, "bytes": taken, "budget_bytes": limit, "planned": planned}

    def _planned(self, entry: MethodEntry) -> int:
        return self._planner.peak(entry.definition, self._as_long_as_data(entry))

    def _as_long_as_data(self, entry: MethodEntry) -> TrainConfig:
        """A row's configuration, with no longer examples than there are.

        What a method holds grows with them in its own way: planned for ``max_length``, short headlines would give the
        others more than the reference's memory.
        """
        config = self._suite.final_config(entry)
        return config.model_copy(update={"max_length": min(config.max_length, self._longest)})

    @cached_property
    def _longest(self) -> int:
        return longest_example(self._data_of)

    def _measured(self, name: str) -> int:
        for line in self._results.all_lines():
            if line["method"] == name and line["stage"] == "peak":
                if "error" in line:
                    raise ConfigError(f"measuring {name} failed: {line['error']}")
                return int(line["peak_bytes"]["tensors"]["total"])
        raise ConfigError(f"the memory of {name} hasn't been measured: name it among the methods too, once.")

    def timing_jobs(self) -> list[Job]:
        """The runs that measure steps: a round of all methods, then the next, so that slow hours hit all alike."""
        jobs = []
        for entry in self._suite.entries:
            memory = self._decided(entry.name, "memory")
            if not _has_failed(memory):
                jobs.append(self._suite.timing_jobs(entry, memory["options"] if memory else {}))
        return [job for turn in zip(*jobs, strict=True) for job in turn]

    def whole_jobs(self) -> list[Job]:
        """Runs of as many steps as are thought to fit, of the rows that aren't decided yet, and of the reference."""
        suite = self._suite
        if not suite.matches_time or not suite.timing_whole:
            return []
        rows = {entry.name: entry for entry in self.undecided()}
        if rows and suite.match_to not in self._timed_whole():
            rows |= {entry.name: entry for entry in suite.entries if entry.name == suite.match_to}
            if suite.match_to not in rows:  # there is nothing to compare with
                return []
        jobs = []
        lines = (line for line in self._results.all_lines() if line["stage"] == "whole" and _is_good(line))
        whole = {line["method"]: len(line["training_loss"]) for line in lines}
        for entry in rows.values():
            memory = self._decided(entry.name, "memory")
            try:
                steps = self._whole_steps(entry.name, whole)
            except ConfigError:  # it can't be matched, and will say so
                continue
            if steps:
                jobs.append(suite.whole_job(entry, steps, memory["options"] if memory else {}))
        return jobs

    def _whole_steps(self, name: str, whole: Mapping[str, int]) -> int:
        """Steps of a row's whole run: those of the one that there is, unless that says that many more fit.

        Args:
            name: The row.
            whole: Steps of the whole runs that there are.

        Raises:
            ConfigError: If it can't be matched.
        """
        known = whole.get(name)
        if known is None:
            return self._steps_of(name, *self._paces(name, "timing"))
        if self._suite.match_to not in whole:
            return known
        counted = self._steps_of(name, *self._paces(name, "whole"))
        return counted if counted > _FURTHER * known else known

    def _steps_of(self, name: str, reference: Pace, own: Pace) -> int:
        """The most steps that a run of a row may have."""
        steps = max(self._suite.steps, self._suite.search_steps)
        return own.steps_in(self._budget(name, reference, steps))

    def fit_time(self) -> None:
        """Decide how many steps fit the reference's time."""
        if not self._suite.matches_time:
            return
        for entry in self.undecided():
            self._results.add_match(entry.name, "time", self._steps(entry))

    def _steps(self, entry: MethodEntry) -> Line:
        suite = self._suite
        try:
            stage: Stage = "whole" if {suite.match_to, entry.name} <= self._timed_whole() else "timing"
            reference, own = self._paces(entry.name, stage)
        except ConfigError as error:
            return {"error": f"Not matched in time: {error}"}
        budgets = [self._budget(entry.name, reference, steps) for steps in (suite.steps, suite.search_steps)]
        steps, search_steps = (own.steps_in(seconds) for seconds in budgets)
        for name, count, seconds in zip(
            ("steps", "search_steps"), (steps, search_steps), budgets, strict=True
        ):
            if count < 1:
                once = f" after {own.once:.3g} of what is done once" if own.once > 0.01 * own.step else ""
                more = f"Raise {name}{' or time_share' if suite.time_share < 1 else ''}."
                return {
                    "error": f"Not matched in time: a step takes {own.step:.3g} {own.clock} seconds{once}, but "
                    f"{part_of(suite.time_share)}{suite.match_to}'s {name} leave {seconds:.3g}. {more}"
                }
        return {
            "steps": steps,
            "search_steps": search_steps,
            "step_seconds": (own.seconds_of(steps) - own.once) / steps,
            "before_seconds": own.once,
            "budget_seconds": budgets[0],
            "clock": own.clock,
        }

    def _timed_whole(self) -> set[str]:
        return {line["method"] for line in self._results.all_lines() if line["stage"] == "whole"}

    def _paces(self, name: str, stage: Stage) -> tuple[Pace, Pace]:
        """Those of the reference and of a method."""
        lines, match_to = self._results.all_lines(), self._suite.match_to
        reference, own = pace(lines, match_to, stage), pace(lines, name, stage)
        if reference.machine != own.machine:
            raise ConfigError(f"{match_to} was timed on {reference.machine}, and {name} on {own.machine}.")
        return reference, own

    def _budget(self, name: str, reference: Pace, steps: int) -> float:
        """Seconds that a method is given: the reference's of so many of its steps, or a share of them."""
        share = 1.0 if name == self._suite.match_to else self._suite.time_share
        return share * reference.seconds_of(steps)

    def _decided(self, row: str, stage: str) -> Line | None:
        return next(
            (x for x in self._results.all_lines() if x["method"] == row and x["stage"] == stage), None
        )


def pace(lines: Iterable[Line], name: str, stage: Stage = "timing") -> Pace:
    """What a method's timings have measured, the short ones or the whole one.

    Raises:
        ConfigError: If there are none, one failed, or they are of several machines.
    """
    timings = [line for line in lines if line["method"] == name and line["stage"] == stage]
    if failed := [line["error"] for line in timings if "error" in line]:
        raise ConfigError(f"timing {name} failed: {failed[0]}")
    if not timings:
        raise ConfigError(f"the time of {name} hasn't been measured")
    machines = sorted({machine_of(x) for x in timings})
    if len(machines) > 1:
        raise ConfigError(f"{name} was timed on several machines: {'; '.join(machines)}")
    clock = clock_of(timings)
    return Pace(
        fmean(step_seconds(x, clock) for x in timings),
        fmean(once_seconds(x, clock) for x in timings),
        clock,
        machines[0],
        tuple(timings[0]["seconds"]["each"][clock]) if stage == "whole" else (),
    )


def _is_good(line: Line | None) -> bool:
    return line is not None and "error" not in line


def _has_failed(line: Line | None) -> bool:
    return line is not None and "error" in line
