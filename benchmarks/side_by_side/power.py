"""What a number of seeds can show: the smallest difference, and how many seeds would show a given one."""

from __future__ import annotations

import math

from scipy import optimize, stats

CHANCE = 0.8  # with which a difference is to be shown, as is usual
MOST_SEEDS = 10_000


def chance_to_show(difference: float, spread: float, seeds: int, level: float) -> float:
    """The chance that a paired t-test calls a difference one, with its sign: the upper tail of a noncentral t.

    Args:
        difference: The true difference, in nats or whatever unit the spread has.
        spread: Standard deviation of the paired differences, above 0.
        seeds: Pairs, at least 2.
        level: Level of the two-sided test, after correction.

    References:
        Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988.
    """
    freedom = seeds - 1
    center = abs(difference) / spread * math.sqrt(seeds)
    edge = float(stats.t.ppf(1 - level / 2, freedom))
    return float(stats.nct.sf(edge, freedom, center))


def smallest_difference(spread: float, seeds: int, level: float, chance: float = CHANCE) -> float:
    """The smallest true difference that some seeds show with a chance.

    Args:
        spread: Standard deviation of the paired differences.
        seeds: Pairs; with fewer than 2 there is no test, and it is infinite.
        level: Level of the test, after correction.
        chance: The chance.
    """
    if seeds < 2 or spread == 0:
        return math.inf if seeds < 2 else 0.0
    high = 1.0
    while chance_to_show(high, 1.0, seeds, level) < chance:
        high *= 2
    found = optimize.brentq(lambda d: chance_to_show(d, 1.0, seeds, level) - chance, 0.0, high)
    return float(found) * spread


def seeds_needed(difference: float, spread: float, level: float, chance: float = CHANCE) -> int | None:
    """How many seeds show a difference with a chance; ``None`` where 10 000 don't.

    Args:
        difference: The true difference.
        spread: Standard deviation of the paired differences.
        level: Level of the test, after correction.
        chance: The chance.
    """
    if difference == 0:
        return None
    if spread == 0 or chance_to_show(difference, spread, 2, level) >= chance:
        return 2
    low, high = 2, 4  # low seeds don't suffice
    while chance_to_show(difference, spread, high, level) < chance:
        low, high = high, high * 2
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = chance_to_show(difference, spread, middle, level) >= chance
        low, high = (low, middle) if enough else (middle, high)
    return high if high <= MOST_SEEDS else None
