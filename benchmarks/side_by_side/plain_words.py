"""A sentence for each method, and one for all of them."""

from __future__ import annotations

import csv
import io
from statistics import fmean
from typing import Any

from .analysis import Analysis
from .rows import Row
from .stored_lines import machine_of
from .wording import signed

_VERDICTS = {
    "lower": "a difference that is shown",
    "higher": "a difference that is shown",
    "no difference shown": "which these runs can't tell from none",
    "not tested": "not tested",
}


def best_trade_offs(analysis: Analysis) -> str | None:
    """What a reader wants to know first; ``None`` where there is nothing to compare."""
    if sum(not row.failed for row in analysis.finished) < 2:
        return None
    # At equal time the seconds differ by less than a step: a front of them would be of what was left over.
    fronts = {"time": () if analysis.suite.matches_time else analysis.fast_front, "memory": analysis.front}
    told = []
    for name in dict.fromkeys(name for front in fronts.values() for name in front):
        kinds = [kind for kind, front in fronts.items() if name in front]
        told.append(f"{name} ({' and '.join(kinds)})")
    return (
        f"Best trade-offs: {', '.join(told)}. No other method here has less loss and takes less of what stands in "
        "brackets; how sure that is, say the intervals."
    )


def describe(row: Row, analysis: Analysis) -> str:
    """A method in a sentence: its loss, and what it takes beside the baseline."""
    assert row.loss is not None
    reference = analysis.suite.reference
    said = f"{row.name} ends at {row.loss.mean:.3f} nats"
    if row.failed:
        ended = f"{len(row.runs)} seed{'s' if len(row.runs) > 1 else ''}"
        return f"{said} in {ended} and failed in {len(row.failed)}, so it isn't compared."
    baseline = next((other for other in analysis.finished if other.name == reference), None)
    if baseline is None or row is baseline or baseline.failed:
        return f"{said}{_takes(row, analysis)}."
    if row.difference is not None:
        said += f", {signed(row.difference.mean)} to {reference} ({_VERDICTS[row.difference.verdict]})"
    takes = [("memory", row.memory_bytes, baseline.memory_bytes)]
    if analysis.seconds_compare:
        clock = analysis.clock
        takes.insert(0, ("seconds", row.training_seconds(clock), baseline.training_seconds(clock)))
    parts = [f"{own / other:.2f} of its {what}" for what, own, other in takes if own is not None and other]
    said += f", with {' and '.join(parts)}" if parts else ""
    if row.right is not None and baseline.right is not None:
        said += f"; {row.right.mean:.0%} right answers against {baseline.right.mean:.0%}"
    return said + "."


def _takes(row: Row, analysis: Analysis) -> str:
    seconds, size = row.training_seconds(analysis.clock), row.memory_bytes
    parts = [] if seconds is None else [f"{seconds:,.{0 if seconds >= 10 else 2}f} {analysis.clock} seconds"]
    parts += [] if size is None else [f"{size / 2**20:,.0f} MiB"]
    return f", with {' and '.join(parts)}" if parts else ""


def score_columns(analysis: Analysis) -> list[tuple[str, str]]:
    """Task and metric of all that the harness scored."""
    return sorted({column for row in analysis.finished for column in row.scores})


def table(analysis: Analysis) -> list[dict[str, Any]]:
    """The numbers of each finished method, for other programs; ``None`` where one wasn't measured."""
    columns = score_columns(analysis)
    return [
        {
            **_numbers(row, analysis),
            **{
                f"lm_eval {task} {metric}": fmean(values)
                if (values := row.scores.get((task, metric)))
                else None
                for task, metric in columns
            },
        }
        for row in analysis.finished
    ]


def _numbers(row: Row, analysis: Analysis) -> dict[str, Any]:
    difference, margin = row.difference, row.margin
    return {
        "method": row.name,
        "seeds": len(row.runs),
        "failed_seeds": len(row.failed),
        "steps": len(row.runs[0]["training_loss"]),
        "learning_rate": row.rate,
        "loss": row.loss.mean if row.loss else None,
        "loss_half_width": row.loss.half_width if row.loss else None,
        "difference": difference.mean if difference else None,
        "difference_low": difference.low if difference else None,
        "difference_high": difference.high if difference else None,
        "p": difference.p if difference else None,
        "verdict": difference.verdict if difference else None,
        "equal_p": margin.equal_p if margin else None,
        "not_worse_p": margin.not_worse_p if margin else None,
        "right": row.right.mean if row.right else None,
        "forgotten": row.forgotten.mean if row.forgotten else None,
        "tensor_bytes": row.tensor_bytes(),
        "process_bytes": row.process_bytes,
        "clock": analysis.clock,
        "seconds_a_step": row.seconds(analysis.clock),
        "seconds": row.training_seconds(analysis.clock),
        "timed_alone": row.timed_alone,
        "timed_on": "; ".join(sorted({machine_of(run) for run in row.timed})),
    }


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A table as CSV; an empty cell where a number wasn't measured."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
