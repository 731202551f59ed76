"""From the runs of a benchmark to what its report says: one row a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from layersample.errors import ConfigError

from .comparison import Difference, Estimate, Margin, compare, compare_margins, estimate, pareto_front
from .entries import MethodEntry
from .rates import choose_rate, mean_losses, read_losses, read_runoffs
from .stored_lines import (
    Line,
    clock_of,
    has_steps,
    last_loss,
    machine_of,
    once_seconds,
    run_seconds,
    step_seconds,
)
from .suite import Suite


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried: its mean loss on the validation split, ``None`` where a run failed."""

    rate: float
    loss: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """What is known of a method. Estimates are over seeds; ``None`` where nothing was measured.

    Args:
        name: The method.
        summary: What it does.
        trials: The learning rates that were tried.
        rate: The one that was chosen.
        errors: Which runs failed, and why.
        runs: Its final runs that ended well, one a seed.
        loss: Held-out loss at the end, in nats a token.
        as_trained: The same with the weights that it trained with, where those aren't what is saved.
        difference: Difference of the loss to the baseline's.
        right: Share of right answers, from 0 to 1.
        right_difference: Difference of the right answers to the baseline's.
        margin: Whether its loss is as good as the baseline's, but for the suite's ``equivalence``.
        timings: Its runs that measured steps alone: the whole one where there is, or else the short ones.
        given: What a match gave it: its lines of the stages ``memory`` and ``time``, by stage.
        forgotten: Loss on other text after training minus before, in nats a token.
        curve: Held-out loss along the run: pairs of a step and an estimate.
    """

    name: str
    summary: str
    trials: tuple[Trial, ...]
    rate: float | None
    errors: tuple[tuple[str, str], ...]
    runs: tuple[Line, ...]
    loss: Estimate | None
    as_trained: Estimate | None
    difference: Difference | None
    right: Estimate | None
    right_difference: Difference | None
    margin: Margin | None
    timings: tuple[Line, ...]
    given: dict[str, Line]
    forgotten: Estimate | None
    curve: tuple[tuple[int, Estimate], ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of several, so that a better one may lie outside."""
        rates = [trial.rate for trial in self.trials]
        return len(rates) > 1 and self.rate in (min(rates), max(rates))

    def mean(self, read: Callable[[Line], float | None]) -> float | None:
        """The mean of something over the seeds; ``None`` if it wasn't measured in all of them."""
        values = [read(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    @property
    def memory_bytes(self) -> float | None:
        """What the front is drawn on: all live tensors, which repeat from run to run, or else the process."""
        tensors = self.tensor_bytes()
        return self.process_bytes if tensors is None else tensors

    @property
    def process_bytes(self) -> float | None:
        """Most bytes of the process in a training step, the mean over seeds."""
        return self.mean(lambda run: run["peak_bytes"]["process"])

    @property
    def device_bytes(self) -> float | None:
        """Most bytes on the GPU in a training step, the mean over seeds; ``None`` without one."""
        return self.mean(lambda run: run["peak_bytes"].get("device"))

    def tensor_bytes(self, kind: str | None = None) -> float | None:
        """Bytes of all live tensors when they were most; or of a kind at that moment."""

        def read(run: Line) -> float | None:
            peak = run["peak_bytes"]["tensors"]
            return None if peak is None else float(peak["total"] if kind is None else peak["at_peak"][kind])

        return self.mean(read)

    def seconds(self, kind: str, phase: str | None = None) -> float | None:
        """Seconds a step of a kind (``"cpu"``, ``"wall"``), in all or of a part: of its timings, where there are."""
        values = [step_seconds(run, kind, phase) for run in self.timed]
        return fmean(values) if values else None

    def once_seconds(self, kind: str) -> float | None:
        """Seconds of what a run does once: what its sampler measures first, and what its first step does besides."""
        values = [once_seconds(run, kind) for run in self.timed]
        return fmean(values) if values else None

    @property
    def timed(self) -> tuple[Line, ...]:
        """The runs that its seconds are of: its timings where there are, or else its final ones."""
        return self.timings or self.runs

    @property
    def run_machines(self) -> frozenset[str]:
        """Those of its final runs; its seconds may be of another one."""
        return frozenset(machine_of(run) for run in self.runs)

    @property
    def timed_elsewhere(self) -> bool:
        """Whether its seconds are of another machine than its losses."""
        return not self.run_machines <= {machine_of(run) for run in self.timed}

    @property
    def timed_alone(self) -> bool | None:
        """Whether no other run of the benchmark was beside those that its seconds are of; ``None``: not noted."""
        noted = [run.get("runs_at_once") for run in self.timed]
        return None if None in noted else all(count == 1 for count in noted)

    def training_seconds(self, kind: str) -> float | None:
        """Seconds of a run's training: of what it does once, and of its steps, both as they were timed."""
        return self.seconds_at(len(self.runs[0]["training_loss"]), kind) if self.runs else None

    def seconds_at(self, step: int, kind: str) -> float:
        """Seconds until the end of a step, with what a run does once, as they were timed."""
        return fmean(run_seconds(run, kind, step) for run in self.timed)

    def used_seconds(self, kind: str) -> float | None:
        """Seconds that its final runs took, whatever was beside them, the mean over seeds.

        ``None`` where they were on another machine than its timings, whose seconds these can't be compared with.
        """
        return None if self.timed_elsewhere else self.mean(lambda run: run_seconds(run, kind))

    def used_beside(self, other: Row, kind: str) -> float | None:
        """How many times the seconds of another row its final runs took, the median over the seeds of both."""
        if self.run_machines != other.run_machines or self.timed_elsewhere:
            return None
        theirs = {run["seed"]: run_seconds(run, kind) for run in other.runs}
        shares = [run_seconds(run, kind) / theirs[run["seed"]] for run in self.runs if run["seed"] in theirs]
        return median(shares) if shares else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that go through a step in a second, as its seconds are timed."""
        return fmean(run["tokens_per_second"] for run in self.timed) if self.timed else None

    @property
    def probabilities(self) -> list[float] | None:
        """Each layer's computed chance to be active, the mean over a run and seeds; ``None`` if not known."""
        columns = [run["inclusion_probabilities"] for run in self.runs]
        if not columns or any(column is None for column in columns):
            return None
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    @property
    def shares(self) -> list[float]:
        """Each layer's share of the steps in which it trained, the mean over seeds."""
        if not self.runs:
            return []
        counts = [0.0] * len(self.runs[0]["layers"])
        for run in self.runs:
            steps = len(run["training_loss"])
            for first, last, active in run["active"]:
                for index in active:
                    counts[index] += (last - first + 1) / steps / len(self.runs)
        return counts


@dataclass(frozen=True)
class Analysis:
    """What a benchmark has found.

    Args:
        suite: What was run.
        rows: One a method, in the suite's order.
        front: Names of the methods that no other beats in both memory and loss, from the smallest memory.
        fast_front: The same of the seconds of training and loss, from the fewest seconds.
        machines: Those that the seconds are of; of several, they say nothing of one another, and no front is drawn.
        clock: What seconds are: ``"cpu"``, or ``"wall"`` where a GPU worked.
        planned: Runs that the suite asks for at the end, not counting those that try learning rates.
    """

    suite: Suite
    rows: tuple[Row, ...]
    front: tuple[str, ...]
    fast_front: tuple[str, ...]
    machines: tuple[str, ...]
    clock: str
    planned: int

    @property
    def finished(self) -> tuple[Row, ...]:
        """The rows that have results, from the lowest loss to the highest."""
        return tuple(
            sorted((row for row in self.rows if row.loss), key=lambda row: row.loss.mean if row.loss else 0)
        )

    @property
    def done(self) -> int:
        """Final runs that have ended well."""
        return sum(len(row.runs) for row in self.rows)

    def row(self, name: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.name == name)

    def called(self, verdict: str) -> list[Row]:
        """The methods whose loss was called so against the baseline."""
        return [row for row in self.rows if row.difference is not None and row.difference.verdict == verdict]


def analyze(suite: Suite, lines: Sequence[Line]) -> Analysis:
    """Analyze the runs of a suite, finished or not.

    Args:
        suite: What was asked for.
        lines: What was measured, as in ``results.jsonl``.

    Raises:
        ConfigError: If runs of one method were measured at different steps.
    """
    own = {entry.name: _current(suite, entry, lines) for entry in suite.entries}
    ended = {
        name: [line for line in current if line["stage"] == "final" and "error" not in line]
        for name, current in own.items()
    }
    losses = {name: {run["seed"]: last_loss(run) for run in runs} for name, runs in ended.items() if runs}
    answers = {
        name: {run["seed"]: run["right"] for run in runs}
        for name, runs in ended.items()
        if runs and all(run["right"] is not None for run in runs)
    }
    level = suite.confidence
    loss_differences = compare(losses, suite.reference, level) if suite.reference in losses else {}
    margins = (
        compare_margins(losses, suite.reference, suite.equivalence, level)
        if suite.reference in losses
        else {}
    )
    right_differences = compare(answers, suite.reference, level) if suite.reference in answers else {}
    rows = tuple(
        _row(
            suite,
            entry,
            own[entry.name],
            ended[entry.name],
            loss_differences.get(entry.name),
            right_differences.get(entry.name),
            margins.get(entry.name),
        )
        for entry in suite.entries
    )
    clock = clock_of(run for row in rows if row.runs for run in row.timed)
    machines = tuple(sorted({machine_of(run) for row in rows if row.runs for run in row.timed}))
    return Analysis(
        suite,
        rows,
        front=_front({row.name: (row.memory_bytes, row.loss) for row in rows}),
        fast_front=_front({row.name: (row.training_seconds(clock), row.loss) for row in rows})
        if len(machines) < 2
        else (),
        machines=machines,
        clock=clock,
        planned=sum(len(suite.seeds_of(entry)) for entry in suite.entries),
    )


def _front(points: Mapping[str, tuple[float | None, Estimate | None]]) -> tuple[str, ...]:
    """The Pareto front of some cost and the loss, of the methods of which both are known."""
    return tuple(
        pareto_front(
            {
                name: (cost, loss.mean)
                for name, (cost, loss) in points.items()
                if cost is not None and loss is not None
            }
        )
    )


def _row(
    suite: Suite,
    entry: MethodEntry,
    lines: list[Line],
    runs: list[Line],
    difference: Difference | None,
    right_difference: Difference | None,
    margin: Margin | None,
) -> Row:
    level = suite.confidence
    runoffs = read_runoffs(lines, entry.name)
    losses = mean_losses(read_losses(lines, entry.name), runoffs)
    trials = [Trial(rate, loss, 1 + len(runoffs.get(rate, ()))) for rate, loss in sorted(losses.items())]
    answers = [run["right"] for run in runs]
    as_trained = [run["loss"].get("as_trained") for run in runs]
    return Row(
        name=entry.name,
        summary=next((run["summary"] for run in runs), ""),
        trials=tuple(trials),
        rate=runs[0]["learning_rate"] if runs else None,
        errors=tuple((line["key"], line["error"]) for line in lines if "error" in line),
        runs=tuple(runs),
        loss=estimate([last_loss(run) for run in runs], level) if runs else None,
        as_trained=estimate(as_trained, level) if as_trained and None not in as_trained else None,
        difference=difference,
        right=estimate(answers, level) if answers and None not in answers else None,
        right_difference=right_difference,
        margin=margin,
        timings=_of_stage("whole", lines) or _of_stage("timing", lines),
        given={x["stage"]: x for x in lines if x["stage"] in ("memory", "time") and "error" not in x},
        forgotten=estimate([r["other_loss"]["after"] - r["other_loss"]["before"] for r in runs], level)
        if runs
        else None,
        curve=_curve(runs, level),
    )


def _of_stage(stage: str, lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line["stage"] == stage and "error" not in line)


def _current(suite: Suite, entry: MethodEntry, lines: Sequence[Line]) -> list[Line]:
    """A method's runs that count.

    All that decided something, its timings of the suite's rounds and steps, and its final ones of its seeds and
    its rate.
    """
    own = [line for line in lines if line["method"] == entry.name]
    given = entry.learning_rates or suite.learning_rates
    rate = choose_rate(given, read_losses(own, entry.name), read_runoffs(own, entry.name))

    def counts(line: Line) -> bool:
        if line["stage"] == "final":
            return line["seed"] in suite.seeds_of(entry) and line["learning_rate"] == rate
        if line["stage"] == "timing":
            return line["seed"] < suite.rounds and has_steps(line, suite.timing_steps)
        return True

    return [line for line in own if counts(line)]


def _curve(runs: list[Line], level: float) -> tuple[tuple[int, Estimate], ...]:
    if not runs:
        return ()
    if any(run["loss"]["steps"] != runs[0]["loss"]["steps"] for run in runs):
        raise ConfigError(
            f"results.jsonl: runs of {runs[0]['method']} must have been measured at the same steps, but they weren't."
        )
    columns = zip(*(run["loss"]["held_out"] for run in runs), strict=True)
    return tuple(
        (step, estimate(values, level))
        for step, values in zip(runs[0]["loss"]["steps"], columns, strict=True)
    )
