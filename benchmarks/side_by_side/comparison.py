"""Statistics over seeds: means with intervals, and paired differences to a baseline, tested together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["lower", "higher", "no difference shown", "not tested"]
Equivalence = Literal["equal", "not worse", "not shown", "not tested"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        half_width: Half of its confidence interval (Student's t); ``None`` with a single seed.
        count: Seeds.
    """

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """How far a method is from the baseline, seed by seed.

    Args:
        mean: Mean of (method − baseline) over the seeds that both have.
        low: Lower end of its interval, at the level at which the correction tested it; ``None`` where it
            couldn't be tested.
        high: Upper end.
        p: Its p-value, corrected for all comparisons.
        verdict: ``"lower"`` or ``"higher"`` where the interval leaves out zero.
        count: Seeds.
        spread: Standard deviation of the paired differences; ``None`` with fewer than two.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    verdict: Verdict
    count: int
    spread: float | None = None


@dataclass(frozen=True)
class Margin:
    """Whether a method is as good as the baseline, but for a margin that doesn't matter.

    Args:
        equal_p: p-value of two one-sided tests (TOST): below one level, both differences beyond the margin are
            ruled out; corrected. ``None`` where it couldn't be tested.
        not_worse_p: p-value of the one that asks for "higher by more than the margin" alone; corrected.
        verdict: What they show.
    """

    equal_p: float | None
    not_worse_p: float | None
    verdict: Equivalence


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of some values, one a seed, with its interval.

    Args:
        values: At least one.
        confidence: Confidence of the interval.
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return Estimate(float(sample.mean()), None, len(sample))
    error = float(stats.sem(sample))
    return Estimate(
        float(sample.mean()), float(stats.t.ppf(0.5 + confidence / 2, len(sample) - 1)) * error, len(sample)
    )


def compare(
    values: Mapping[str, Mapping[int, float]], baseline: str, confidence: float = 0.95
) -> dict[str, Difference]:
    """Compare every method with the baseline: paired t-tests over seeds, corrected together by Holm's method.

    The chance that any of the methods is called different while none is, is at most 1 − ``confidence``. Each
    interval is at the level at which Holm's method tested that difference, so it leaves out zero exactly where
    the difference is called one.

    Args:
        values: For each method, the value of each seed.
        baseline: The method that the others are compared with.
        confidence: Confidence of the test as a whole.

    References:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    pairs = _pairs(values, baseline)
    tested = {name: differences for name, differences in pairs.items() if _can_be_tested(differences)}
    p_values = {name: float(stats.ttest_1samp(differences, 0).pvalue) for name, differences in tested.items()}
    levels, corrected = _holm(p_values, 1 - confidence)
    return {
        name: _difference(differences, levels.get(name), corrected.get(name))
        for name, differences in pairs.items()
    }


def compare_margins(
    values: Mapping[str, Mapping[int, float]], baseline: str, margin: float, confidence: float = 0.95
) -> dict[str, Margin]:
    """Whether each method is as good as the baseline, but for a margin: paired tests, corrected by Holm's method.

    "No difference shown" doesn't mean equal: too few seeds show none either. These tests turn the question round.

    Args:
        values: For each method, the value of each seed; lower is better.
        baseline: The method that the others are compared with.
        margin: The difference that doesn't matter, above 0, in the unit of the values.
        confidence: Confidence of the tests of all methods together, for each of the two questions (equal, not worse).

    References:
        Schuirmann, A comparison of the two one-sided tests procedure and the power approach, 1987.
    """
    pairs = _pairs(values, baseline)
    tested = {name: differences for name, differences in pairs.items() if _can_be_tested(differences)}
    above = {n: float(stats.ttest_1samp(d, margin, alternative="less").pvalue) for n, d in tested.items()}
    below = {n: float(stats.ttest_1samp(d, -margin, alternative="greater").pvalue) for n, d in tested.items()}
    alpha = 1 - confidence
    not_worse = _holm(above, alpha)[1]
    equal = _holm({name: max(above[name], below[name]) for name in tested}, alpha)[1]
    return {name: _margin(equal.get(name), not_worse.get(name), alpha) for name in pairs}


def _margin(equal: float | None, not_worse: float | None, alpha: float) -> Margin:
    if equal is None or not_worse is None:
        return Margin(None, None, "not tested")
    verdict: Equivalence = "equal" if equal < alpha else "not worse" if not_worse < alpha else "not shown"
    return Margin(equal, not_worse, verdict)


def _pairs(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, np.ndarray]:
    """Differences to the baseline of each method, of the seeds that both have; nothing of one that shares none."""
    return {
        name: np.array(
            [own[seed] - values[baseline][seed] for seed in sorted(own.keys() & values[baseline].keys())]
        )
        for name, own in values.items()
        if name != baseline and own.keys() & values[baseline].keys()
    }


def _can_be_tested(differences: np.ndarray) -> bool:
    """Two seeds at least, and some spread between them: equal differences say nothing of the noise."""
    if len(differences) < 2:
        return False
    return float(np.ptp(differences)) > 1e-12 * max(
        1.0, float(np.abs(differences).max())
    )  # more than rounding


def _difference(differences: np.ndarray, level: float | None, p: float | None) -> Difference:
    count = len(differences)
    mean = float(differences.mean()) if count else float("nan")
    spread = float(differences.std(ddof=1)) if count > 1 else None
    if level is None or p is None:
        same = count > 1 and not differences.any()
        return Difference(
            mean, None, None, None, "no difference shown" if same else "not tested", count, spread
        )
    half = float(stats.t.ppf(1 - level / 2, count - 1) * stats.sem(differences))
    low, high = mean - half, mean + half
    verdict: Verdict = "lower" if high < 0 else "higher" if low > 0 else "no difference shown"
    return Difference(mean, low, high, p, verdict, count, spread)


def _holm(p_values: Mapping[str, float], alpha: float) -> tuple[dict[str, float], dict[str, float]]:
    """The level at which each hypothesis is tested, and the corrected p-values.

    The smallest p-value is tested at alpha / m, the next at alpha / (m − 1), and so on; from the first that
    isn't rejected, all others stay at its level, as they aren't rejected either.
    """
    levels: dict[str, float] = {}
    corrected: dict[str, float] = {}
    level, highest, stopped = alpha, 0.0, False
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        left = len(p_values) - rank
        if not stopped:
            level = alpha / left
            stopped = p_values[name] >= level
        highest = max(highest, min(1.0, p_values[name] * left))
        levels[name], corrected[name] = level, highest
    return levels, corrected


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other point beats in both coordinates, by the first one; lower is better.

    Args:
        points: Pairs by name.
    """
    front = []
    best = float("inf")
    for name in sorted(points, key=points.__getitem__):
        if points[name][1] < best:
            front.append(name)
            best = points[name][1]
    return front
