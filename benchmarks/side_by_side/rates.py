"""Which learning rates a method is tried with, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .stored_lines import last_loss

Losses = Mapping[float, float | None]


def find_rates(grid: Iterable[float], losses: Losses, extensions: int) -> list[float]:
    """The rates to try: a grid and, where the best one is at an edge, others beyond it.

    Methods differ in the rates that suit them, and one whose best rate is the highest of a grid is judged by the
    grid. So it goes on in that direction, by the ratio of its outermost rates, until there is a worse one.

    Args:
        grid: Rates to begin with; a single one is taken as it is.
        losses: Those that were tried, with their loss on the validation split; ``None`` where the run failed.
        extensions: Rates that are added at most.

    Returns:
        Rates, ascending. They may become more when those are tried that weren't yet.
    """
    rates = sorted(grid)
    if len(rates) == 1:
        return rates
    for _ in range(extensions):
        if any(rate not in losses for rate in rates):
            break
        best = best_rate({rate: losses[rate] for rate in rates})
        if best == rates[-1]:
            rates.append(_round(best * best / rates[-2]))
        elif best == rates[0]:
            rates.insert(0, _round(best * best / rates[1]))
        else:
            break
    return rates


def best_rate(losses: Losses) -> float | None:
    """The rate with the lowest loss; ``None`` where all failed, or none was tried."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__) if known else None


def find_finalists(losses: Losses) -> list[float]:
    """The two rates with the lowest losses, which are tried with more seeds: on one, luck may decide between them."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return sorted(known, key=known.__getitem__)[:2]


def choose_rate(
    given: Sequence[float] | None, losses: Losses, runoffs: Mapping[float, Sequence[float | None]]
) -> float | None:
    """The rate that a method is measured with: the only one that was given, or the best of those tried.

    Args:
        given: The grid that was asked for; ``None`` where none was.
        losses: Those that were tried with the first seed, as in :func:`find_rates`.
        runoffs: Losses of some with more seeds: these rates go before the others, and the mean counts.
    """
    if given is not None and len(given) == 1:
        return given[0]
    means = mean_losses(losses, runoffs)
    best = best_rate({rate: means[rate] for rate in runoffs if rate in means})
    return best_rate(means) if best is None else best


def mean_losses(losses: Losses, runoffs: Mapping[float, Sequence[float | None]]) -> dict[float, float | None]:
    """The mean loss of each rate over the seeds that it was tried with; ``None`` where a run failed."""
    means: dict[float, float | None] = {}
    for rate, first in losses.items():
        known = [loss for loss in (first, *runoffs.get(rate, ())) if loss is not None]
        means[rate] = fmean(known) if len(known) == 1 + len(runoffs.get(rate, ())) else None
    return means


def read_losses(lines: Iterable[Mapping[str, Any]], method: str) -> dict[float, float | None]:
    """What the runs that tried a method's rates have measured on the validation split."""
    return {
        line["learning_rate"]: None if "error" in line else last_loss(line)
        for line in lines
        if line["method"] == method and line["stage"] == "search"
    }


def read_runoffs(lines: Iterable[Mapping[str, Any]], method: str) -> dict[float, list[float | None]]:
    """What the runs with more seeds have measured on the validation split, by rate."""
    found: dict[float, list[float | None]] = {}
    for line in lines:
        if line["method"] == method and line["stage"] == "runoff":
            found.setdefault(line["learning_rate"], []).append(None if "error" in line else last_loss(line))
    return found


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")
