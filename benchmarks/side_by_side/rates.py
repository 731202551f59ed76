"""Which learning rates a method is tried with, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .stored_lines import last_loss

Losses = Mapping[float, float | None]
Runoffs = Mapping[float, Sequence[float | None]]


@dataclass(frozen=True)
class RateSearch:
    """What a method's search tries.

    Attributes:
        rates: To be tried with the first seed, ascending. They may become more when those are tried that weren't yet.
        finalists: Of them, those to be tried with more seeds: on one, luck may decide between them.
    """

    rates: tuple[float, ...]
    finalists: tuple[float, ...]


def plan_search(
    grid: Iterable[float], losses: Losses, runoffs: Runoffs, *, extensions: int, seeds: int
) -> RateSearch:
    """A grid, the best two of it and, where the best one is at an edge, rates beyond it.

    Methods differ in the rates that suit them, and one whose best rate is the highest of a grid is judged by the
    grid. So it goes on in that direction, by the ratio of its outermost rates, until there is a worse one: first by
    the losses of the first seed, then by the means of all seeds.

    Args:
        grid: Rates to begin with; a single one is taken as it is.
        losses: Those that were tried, with their loss on the validation split; ``None`` where the run failed.
        runoffs: Losses of some with more seeds.
        extensions: Rates that are added at most.
        seeds: Seeds of the search, the first among them.
    """
    rates = sorted(grid)
    if len(rates) == 1:
        return RateSearch(tuple(rates), ())
    most = len(rates) + extensions

    def go_on(means: Losses) -> bool:
        return len(rates) < most and _go_beyond(rates, best_rate(means))

    while all(rate in losses for rate in rates) and go_on({rate: losses[rate] for rate in rates}):
        pass
    finalists = _from_the_best({rate: losses.get(rate) for rate in rates})[:2]

    def known(rate: float) -> bool:
        return rate in losses and (losses[rate] is None or len(runoffs.get(rate, ())) >= seeds - 1)

    while seeds > 1 and all(known(rate) for rate in finalists):
        before, means = set(rates), mean_losses(losses, runoffs)
        if not go_on({rate: means[rate] for rate in finalists}):
            break
        finalists += set(rates) - before
    # A rate that was added and failed is never chosen: further seeds would be for nothing.
    return RateSearch(tuple(rates), tuple(rate for rate in finalists if losses.get(rate, 0.0) is not None))


def _go_beyond(rates: list[float], best: float | None) -> bool:
    """Add the rate beyond the best one to ascending ``rates``; ``False`` where that isn't at an edge."""
    if best == rates[-1]:
        rates.append(_round(best * best / rates[-2]))
    elif best == rates[0]:
        rates.insert(0, _round(best * best / rates[1]))
    else:
        return False
    return True


def best_rate(losses: Losses) -> float | None:
    """The rate with the lowest loss; ``None`` where all failed, or none was tried."""
    return next(iter(_from_the_best(losses)), None)


def _from_the_best(losses: Losses) -> list[float]:
    """Rates that didn't fail, the lowest loss first."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return sorted(known, key=known.__getitem__)


def choose_rate(given: Sequence[float] | None, losses: Losses, runoffs: Runoffs) -> float | None:
    """The rate that a method is measured with: the only one that was given, or the best of those tried.

    Args:
        given: The grid that was asked for; ``None`` where none was.
        losses: Those that were tried with the first seed, as in :func:`plan_search`.
        runoffs: Losses of some with more seeds: these rates go before the others, and the mean counts.
    """
    if given is not None and len(given) == 1:
        return given[0]
    means = mean_losses(losses, runoffs)
    best = best_rate({rate: means[rate] for rate in runoffs if rate in means})
    return best_rate(means) if best is None else best


def mean_losses(losses: Losses, runoffs: Runoffs) -> dict[float, float | None]:
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
