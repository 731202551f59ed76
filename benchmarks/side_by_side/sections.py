"""Two tables of the report: what each method was given, and what the seeds can tell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .analysis import Analysis, Row
from .power import CHANCE, seeds_needed, smallest_difference
from .stored_lines import Line
from .suite import Suite
from .wording import DASH, mib, number, p_value, seconds


def level_of(suite: Suite) -> float:
    """The strictest level at which Holm's method tests a difference."""
    return (1 - suite.confidence) / max(1, len(suite.entries) - 1)


def matched(analysis: Analysis) -> list[dict[str, str]]:
    """What each method was given, and what it has used."""
    return [_matched(row) for row in analysis.finished] if analysis.suite.match != "steps" else []


def _matched(row: Row) -> dict[str, str]:
    time, memory = row.given.get("time"), row.given.get("memory")
    clock = time["clock"] if time else "cpu"
    options = memory["options"] if memory else {}
    return {
        "name": row.name,
        "steps": str(len(row.runs[0]["training_loss"])),
        "options": ", ".join(f"{key} {value}" for key, value in options.items()) or DASH,
        "given_seconds": number(time["budget_seconds"] if time else None, "{:.1f}"),
        "used_seconds": number(row.used_seconds(clock), "{:.1f}"),
        "step_seconds": seconds(time["step_seconds"] if time else None),
        "given_bytes": mib(memory["budget_bytes"] if memory else None),
        "planned_bytes": f"{mib(memory['bytes'])}{'' if memory['planned'] else ' (measured)'}"
        if memory
        else DASH,
        "used_bytes": mib(row.tensor_bytes()),
    }


def power(analysis: Analysis) -> list[dict[str, str]]:
    """For each method, the smallest difference that its seeds could have shown, and whether it is as good."""
    level = level_of(analysis.suite)
    rows = []
    for row in analysis.finished:
        difference = row.difference
        if difference is None or difference.spread is None:
            continue
        smallest = smallest_difference(difference.spread, difference.count, level)
        needed = seeds_needed(smallest / 2, difference.spread, level)
        rows.append(
            {
                "name": row.name,
                "spread": f"{difference.spread:.4f}",
                "smallest": f"{smallest:.3f}",
                "seeds": str(difference.count),
                "needed": DASH if needed is None else str(needed),
                "equal_p": p_value(row.margin.equal_p if row.margin else None),
                "not_worse_p": p_value(row.margin.not_worse_p if row.margin else None),
                "margin": row.margin.verdict if row.margin else DASH,
            }
        )
    return rows


def spreads(analysis: Analysis) -> list[float]:
    """The spread of each method's paired differences, where there are two at least."""
    known = [row.difference.spread for row in analysis.rows if row.difference is not None]
    return [spread for spread in known if spread]


def power_afterwards(analysis: Analysis) -> str | None:
    """What the seeds that were run can show, in a sentence; ``None`` where the spread isn't known."""
    known, seeds = spreads(analysis), max((len(row.runs) for row in analysis.rows), default=0)
    if not known or seeds < 2:
        return None
    level, spread = level_of(analysis.suite), statistics.median(known)
    smallest = smallest_difference(spread, seeds, level)
    needed = seeds_needed(smallest / 2, spread, level)
    half = "" if needed is None else f"; one half as large needs {needed} seeds"
    return (
        f"With {seeds} seeds a difference of {smallest:.3f} nats is shown with a chance of {CHANCE:.0%}, by the "
        f"median spread of paired differences ({spread:.3f}){half}."
    )


def power_beforehand(suite: Suite, known: Analysis | None) -> str:
    """What a suite's seeds will be able to show, in a sentence, before they are run.

    Args:
        suite: What is asked for.
        known: What is stored already; of no use without two seeds of two methods.
    """
    seeds, level = len(suite.seeds), level_of(suite)
    if seeds < 2:
        return "With 1 seed no difference is tested: give at least 2."
    spread = statistics.median(spreads(known)) if known is not None and spreads(known) else None
    words = _counts(seeds, level, spread)
    if spread is None:
        return (
            f"With {seeds} seeds a difference of {words[seeds]} times the spread of the paired differences, which "
            f"isn't known yet, will be shown with a chance of {CHANCE:.0%}; {_listed(words, seeds)}."
        )
    return (
        f"With {seeds} seeds a difference of {words[seeds]} nats will be shown with a chance of {CHANCE:.0%}, by the "
        f"spread of the runs that are there ({spread:.3f}); {_listed(words, seeds)}."
    )


def _counts(seeds: int, level: float, spread: float | None) -> dict[int, str]:
    counts = sorted({seeds, *(count for count in (5, 8, 12) if count > seeds)})
    style = "{:.2g}" if spread is None else "{:.3f}"
    return {count: style.format(smallest_difference(spread or 1.0, count, level)) for count in counts}


def _listed(words: Mapping[int, str], seeds: int) -> str:
    others = [f"{count} seeds {size}" for count, size in words.items() if count != seeds]
    return ", ".join(others) or "more seeds show less than in proportion to their number"


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
    if (power := power_afterwards(analysis)) is not None:
        said.append(power)
    return said


def match_words(suite: Suite) -> str:
    """What all methods have alike, for the head of the report."""
    if suite.match == "steps":
        return "the same number of steps"
    shares = {"time": suite.time_share, "memory": suite.memory_share}
    kinds = [
        kind for kind, wanted in (("time", suite.matches_time), ("memory", suite.matches_memory)) if wanted
    ]
    parts = [("" if shares[kind] == 1 else f"{shares[kind]:g} of ") + f"the {kind}" for kind in kinds]
    return f"{' and '.join(parts)} of {suite.match_to} at {suite.steps} steps"


def timing_words(rows: Sequence[Row]) -> str:
    """How the seconds of all methods were measured, in a sentence."""
    alone = {row.timed_alone for row in rows}
    if rounds := max((len(row.timings) for row in rows), default=0):
        with_nothing = ", with nothing of the benchmark beside them," if alone == {True} else ""
        return f"Seconds are of {rounds} runs a method{with_nothing} in turns with the others'."
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
    rows = [row for row in analysis.finished if all(run.get("lm_eval") for run in row.runs)]
    scores = [run["lm_eval"] for row in rows for run in row.runs]
    columns = sorted(
        {
            (task, key)
            for one in scores
            for task, metrics in one.items()
            for key in metrics
            if "_stderr" not in key
        }
    )
    return {
        "columns": [f"{task}: {key}" for task, key in columns],
        "rows": [
            [row.name, *(number(row.mean(_metric(*column)), "{:.4f}") for column in columns)] for row in rows
        ],
    }


def _metric(task: str, key: str) -> Callable[[Line], float | None]:
    return lambda run: run["lm_eval"].get(task, {}).get(key)
