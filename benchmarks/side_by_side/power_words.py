"""What the seeds of a benchmark can tell, beforehand and afterwards: a table and sentences."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

from .analysis import Analysis
from .power import CHANCE, seeds_needed, smallest_difference
from .suite import Suite
from .wording import DASH, p_value


def _level(suite: Suite, comparisons: int) -> float:
    """The strictest level at which Holm's method tests one of some differences."""
    return (1 - suite.confidence) / max(1, comparisons)


def _level_of(analysis: Analysis) -> float:
    """The strictest level at which a difference was tested: rows without runs count in no correction."""
    tested = [row for row in analysis.rows if row.difference is not None and row.difference.p is not None]
    return _level(analysis.suite, len(tested))


def power_table(analysis: Analysis) -> list[dict[str, str]]:
    """For each method, the smallest difference that its seeds could have shown, and whether it is as good."""
    level = _level_of(analysis)
    rows = []
    for row in analysis.finished:
        difference = row.difference
        if difference is None or difference.spread is None:
            continue
        smallest, needed = _smallest(difference.spread, difference.count, level)
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


def _smallest(spread: float, seeds: int, level: float) -> tuple[float, int | None]:
    """The smallest difference that is shown, and how many seeds show one half as large."""
    smallest = smallest_difference(spread, seeds, level)
    return smallest, seeds_needed(smallest / 2, spread, level)


def _spreads(analysis: Analysis) -> dict[int, list[float]]:
    """The spread of each method's paired differences, where there are two at least, by their number."""
    known: dict[int, list[float]] = {}
    for row in analysis.rows:
        if row.difference is not None and row.difference.spread:
            known.setdefault(row.difference.count, []).append(row.difference.spread)
    return dict(sorted(known.items(), reverse=True))


def power_afterwards(analysis: Analysis) -> list[str]:
    """What the seeds that were run can show, in a sentence for each number of them that methods have."""
    known, level = _spreads(analysis), _level_of(analysis)
    said = []
    for seeds, spreads in known.items():
        spread = statistics.median(spreads)
        smallest, needed = _smallest(spread, seeds, level)
        half = "" if needed is None else f"; one half as large needs {needed} seeds"
        whose = "" if len(known) == 1 else f", as in {len(spreads)} of the comparisons,"
        said.append(
            f"With {seeds} seeds{whose} a difference of {smallest:.3f} nats is shown with a chance of {CHANCE:.0%}, "
            f"by the median spread of paired differences ({spread:.3f}){half}."
        )
    return said


def power_beforehand(suite: Suite, known: Analysis | None, others: Collection[str] = ()) -> str:
    """What a suite's seeds will be able to show, in a sentence, before they are run.

    Args:
        suite: What is asked for.
        known: What is stored already; of no use without two seeds of two methods.
        others: Names of rows that have been run, and count as comparisons too.
    """
    rows = {entry.name for entry in suite.entries} | {*others}
    seeds, level = len(suite.seeds), _level(suite, len(rows) - 1)
    if seeds < 2:
        return "With 1 seed no difference is tested: give at least 2."
    spreads = [] if known is None else [spread for some in _spreads(known).values() for spread in some]
    spread = statistics.median(spreads) if spreads else None
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
