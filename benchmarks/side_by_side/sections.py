"""Sections of the report beside the main tables: what each method was given, what was tried, what a harness scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .analysis import Analysis
from .comparison import estimate
from .plain_words import score_columns
from .power_words import power_afterwards
from .rows import Row
from .suite import Suite
from .wording import DASH, mib, number, part_of, seconds, with_interval

_TIME_TOLERANCE = 0.1  # as far as seconds of runs repeat that have others beside them


def matched(analysis: Analysis) -> list[dict[str, str]]:
    """What each method was given, and what it has used."""
    if analysis.suite.match == "steps":
        return []
    reference = _reference(analysis)
    return [_matched(row, reference) for row in analysis.finished]


def _reference(analysis: Analysis) -> Row | None:
    return next((row for row in analysis.finished if row.name == analysis.suite.match_to), None)


def _matched(row: Row, reference: Row | None) -> dict[str, str]:
    time, memory = row.given.get("time"), row.given.get("memory")
    clock = time["clock"] if time else "cpu"
    options = memory["options"] if memory else {}
    return {
        "name": row.name,
        "steps": str(len(row.runs[0]["training_loss"])),
        "options": ", ".join(f"{key} {value}" for key, value in options.items()) or DASH,
        "given_seconds": number(time["budget_seconds"] if time else None, "{:.1f}"),
        "used_seconds": number(row.used_seconds(clock), "{:.1f}"),
        "used_share": number(row.used_beside(reference, clock) if reference else None, "{:.2f}"),
        "step_seconds": seconds(time["step_seconds"] if time else None),
        "given_bytes": mib(memory["budget_bytes"] if memory else None),
        "planned_bytes": f"{mib(memory['bytes'])}{'' if memory['planned'] else ' (measured)'}"
        if memory
        else DASH,
        "used_bytes": mib(row.tensor_bytes()),
    }


def sentences(analysis: Analysis) -> list[str]:
    """What the tests for equivalence and the match say, in sentences."""
    said: list[str] = []
    margin, reference = f"{analysis.suite.equivalence:g}", analysis.suite.reference
    for verdict, words in (
        ("equal", f"Equal to {reference} within ±{margin} nats (TOST)"),
        ("not worse", f"Not worse than {reference} by more than {margin} nats"),
    ):
        if names := [row.name for row in analysis.rows if row.margin and row.margin.verdict == verdict]:
            said.append(f"{words}: {', '.join(names)}.")
    return [*said, *power_afterwards(analysis), *_beyond_their_memory(analysis)]


def out_of_time(analysis: Analysis) -> list[str]:
    """Which methods used more or less than they were given, beside the reference in the same seeds."""
    suite, reference = analysis.suite, _reference(analysis)
    if not suite.matches_time or reference is None:
        return []
    out = []
    for row in analysis.finished:
        steps, used = len(row.runs[0]["training_loss"]), row.used_beside(reference, analysis.clock)
        if used is None or row is reference:
            continue
        share = used / suite.time_share
        if abs(share - 1) > max(_TIME_TOLERANCE, 1 / steps):  # what is left of a step isn't used
            out.append(f"{row.name} ({share:.2f})")
    if not out:
        return []
    return [
        f"Not at equal time by more than a tenth, in shares of {part_of(suite.time_share)}{suite.match_to}'s seconds "
        f"in the same seeds: {', '.join(out)}."
    ]


def _beyond_their_memory(analysis: Analysis) -> list[str]:
    """Which methods held more than the reference did, or their share of it: the match is by plans."""
    suite, reference = analysis.suite, _reference(analysis)
    limit = None if reference is None else reference.tensor_bytes()
    if not suite.matches_memory or limit is None:
        return []
    beyond = [
        f"{row.name} ({mib(held)})"
        for row in analysis.finished
        if row is not reference
        and (held := row.tensor_bytes()) is not None
        and held > 1.01 * suite.memory_share * limit
    ]
    if not beyond:
        return []
    return [
        f"Held more MiB than {part_of(suite.memory_share)}{suite.match_to}'s {mib(limit)}: {', '.join(beyond)}. "
        "Memory is matched by plans for the longest examples; these are the peaks of the real ones."
    ]


def match_words(suite: Suite) -> str:
    """What all methods have alike, for the head of the report."""
    if suite.match == "steps":
        return "the same number of steps"
    shares = {"time": suite.time_share} if suite.matches_time else {}
    shares |= {"planned memory": suite.memory_share} if suite.matches_memory else {}
    parts = " and ".join(f"{part_of(share)}the {kind}" for kind, share in shares.items())
    itself = "" if set(shares.values()) == {1} else ", which itself has all of it"
    return f"{parts} of {suite.match_to} at {suite.steps} steps{itself}"


def timing_words(rows: Sequence[Row]) -> str:
    """How the seconds of all methods were measured, and which of them are of another machine than the losses."""
    others = [row for row in rows if row.timed_elsewhere]
    if not others:
        return _timing(rows)
    whose = "" if len(others) == len(rows) else f" of {', '.join(row.name for row in others)}"
    machines = sorted({machine for row in others for machine in row.run_machines})
    return f"{_timing(rows)} Losses and memory{whose} are of runs on another machine: {'; '.join(machines)}."


def _timing(rows: Sequence[Row]) -> str:
    alone = {row.timed_alone for row in rows}
    if any(run["stage"] == "whole" for row in rows for run in row.timings):
        return "Seconds are of a whole run a method, with nothing of the benchmark beside it."
    if rounds := max((len(row.timings) for row in rows), default=0):
        with_nothing = ", with nothing of the benchmark beside them," if alone == {True} else ""
        runs = "a run" if rounds == 1 else f"{rounds} runs"
        return f"Seconds are of {runs} a method{with_nothing} in turns with the others'."
    if None in alone:
        return "Whether runs were beside others wasn't noted then."
    if alone == {True}:
        return "No two runs of the benchmark were at the same time."
    return "Runs were beside others of the benchmark, which lengthens their seconds."


def tried(search: Mapping[str, Any]) -> dict[str, Any]:
    """What a search for a recipe tried, from the best to the worst."""
    keys = list(search["space"]["space"])
    return {
        "name": search["name"],
        "method": search["space"]["method"] or search["name"],
        "keys": keys,
        "seed": search["space"]["seed"],
        "keep": search["space"]["keep"],
        "waves": search["space"]["waves"],
        "last_seeds": search["space"]["seeds"],
        "tries": [
            {
                "chosen": [_choice(value) for value in map(one["chosen"].get, keys)],
                "losses": "; ".join(f"{loss:.4f}" for loss in one["losses"]) or DASH,
                "error": one["error"] or "",
            }
            for one in search["tries"]
        ],
    }


def _choice(value: Any) -> str:
    if isinstance(value, Mapping):  # options that go together
        return ", ".join(f"{option} {_choice(its)}" for option, its in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def harness(analysis: Analysis) -> dict[str, Any]:
    """What the harness scored: a column for each task's metric, and a row a method; the mean over seeds."""
    columns = score_columns(analysis)
    level = analysis.suite.confidence
    return {
        "columns": [f"{task}: {metric}{_direction(analysis, task, metric)}" for task, metric in columns],
        "rows": [
            [
                row.name,
                *(
                    with_interval(estimate(values, level) if (values := row.scores.get(column)) else None, 4)
                    for column in columns
                ),
            ]
            for row in analysis.finished
            if row.scores
        ],
    }


def _direction(analysis: Analysis, task: str, metric: str) -> str:
    """Which scores are good, where the harness knows it; a metric's filter stands behind a comma."""
    known = {
        run.get("lm_eval_higher_is_better", {}).get(task, {}).get(metric.partition(",")[0])
        for row in analysis.finished
        for run in row.runs
    } - {None}
    return f" ({'higher' if known == {True} else 'lower'} is better)" if len(known) == 1 else ""
