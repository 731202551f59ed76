"""From the runs of a benchmark to what its report says: one row a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from layersample.errors import ConfigError

from .comparison import Difference, Estimate, Margin, compare, compare_margins, estimate, pareto_front
from .entries import MethodEntry
from .rates import choose_rate, mean_losses, read_losses, read_runoffs
from .rows import Row, Trial
from .stored_lines import Line, clock_of, has_steps, last_loss, machine_of
from .suite import Suite


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
        """The rows that have results, from the lowest loss to the highest; behind them those of which runs failed."""
        ended = [row for row in self.rows if row.standing is not None]
        return tuple(sorted(ended, key=lambda row: (bool(row.failed), row.standing)))

    @property
    def seconds_compare(self) -> bool:
        """Whether the seconds of all rows are of one machine, and may stand beside each other."""
        return len(self.machines) < 2

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
    # A method that diverged in some seeds would look the better for it.
    compared = {name: runs for name, runs in ended.items() if runs and not _failed(own[name])}
    losses = {name: {run["seed"]: last_loss(run) for run in runs} for name, runs in compared.items()}
    answers = {
        name: {run["seed"]: run["right"] for run in runs}
        for name, runs in compared.items()
        if all(run["right"] is not None for run in runs)
    }
    level = suite.confidence
    loss_differences = compare(losses, suite.reference, level) if suite.reference in losses else {}
    margins = (
        compare_margins(losses, suite.reference, suite.equivalence, level)
        if suite.reference in losses
        else {}
    )
    right_differences = compare(answers, suite.reference, level) if suite.reference in answers else {}
    baseline = fmean(losses[suite.reference].values()) if suite.reference in losses else None
    rows = tuple(
        _row(
            suite,
            entry,
            own[entry.name],
            ended[entry.name],
            loss_differences.get(entry.name),
            right_differences.get(entry.name),
            margins.get(entry.name),
            baseline,
        )
        for entry in suite.entries
    )
    clock = clock_of(run for row in rows if row.runs for run in row.timed)
    machines = tuple(sorted({machine_of(run) for row in rows if row.runs for run in row.timed}))
    return Analysis(
        suite,
        rows,
        front=_front(rows, {row.name: row.memory_bytes for row in rows}),
        fast_front=_front(rows, {row.name: row.training_seconds(clock) for row in rows})
        if len(machines) < 2
        else (),
        machines=machines,
        clock=clock,
        planned=sum(len(suite.seeds_of(entry)) for entry in suite.entries),
    )


def _front(rows: Iterable[Row], costs: Mapping[str, float | None]) -> tuple[str, ...]:
    """The Pareto front of some cost and the loss, of the methods of which both are known."""
    points = {row.name: (costs[row.name], row.standing) for row in rows if not row.failed}
    return tuple(
        pareto_front(
            {
                name: (cost, loss)
                for name, (cost, loss) in points.items()
                if cost is not None and loss is not None
            }
        )
    )


def _failed(lines: Iterable[Line]) -> tuple[int, ...]:
    """The seeds of final runs that failed."""
    return tuple(line["seed"] for line in lines if line["stage"] == "final" and "error" in line)


def _row(
    suite: Suite,
    entry: MethodEntry,
    lines: list[Line],
    runs: list[Line],
    difference: Difference | None,
    right_difference: Difference | None,
    margin: Margin | None,
    baseline: float | None,
) -> Row:
    level = suite.confidence
    runoffs = read_runoffs(lines, entry.name)
    losses = mean_losses(read_losses(lines, entry.name), runoffs)
    trials = [Trial(rate, loss, 1 + len(runoffs.get(rate, ()))) for rate, loss in sorted(losses.items())]
    answers = [run["right"] for run in runs]
    as_trained = [run["loss"].get("as_trained") for run in runs]
    loss = estimate([last_loss(run) for run in runs], level) if runs else None
    return Row(
        name=entry.name,
        summary=next((run["summary"] for run in runs), ""),
        trials=tuple(trials),
        rate=runs[0]["learning_rate"] if runs else None,
        errors=tuple(
            (line["key"], line[kind]) for line in lines for kind in ("error", "lm_eval_error") if kind in line
        ),
        runs=tuple(runs),
        failed=_failed(lines),
        loss=loss,
        standing=_standing(loss, difference, baseline),
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


def _standing(loss: Estimate | None, difference: Difference | None, baseline: float | None) -> float | None:
    """What a row is ranked by: means of other seeds than the baseline's say little beside it."""
    if baseline is not None and difference is not None:
        return baseline + difference.mean
    return None if loss is None else loss.mean


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
