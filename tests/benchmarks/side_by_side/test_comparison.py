"""The statistics of the benchmark, on simulated results whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from layersample_benchmarks.side_by_side.comparison import compare, compare_margins, estimate, pareto_front


def simulate(
    generator: np.random.Generator, methods: int, seeds: int, effect: float = 0.0
) -> dict[str, dict[int, float]]:
    """Losses that share each seed's luck, as runs on the same data order do; the last method is better."""
    luck = generator.normal(0, 0.05, seeds)
    own = generator.normal(0, 0.02, (methods, seeds))
    values = {f"m{i}": dict(enumerate(1 + luck + own[i])) for i in range(methods)}
    values[f"m{methods - 1}"] = {seed: value - effect for seed, value in values[f"m{methods - 1}"].items()}
    return values


@pytest.mark.parametrize(("methods", "seeds"), [(2, 3), (2, 5), (9, 3)])
def test_copies_of_one_method_are_called_different_at_the_stated_rate_at_most(
    methods: int, seeds: int
) -> None:
    """Over many trials; all of the comparisons of a trial together."""
    generator = np.random.default_rng(0)
    trials = 1500
    wrong = sum(
        any(
            d.verdict in ("lower", "higher")
            for d in compare(simulate(generator, methods, seeds), "m0").values()
        )
        for _ in range(trials)
    )
    # At most 5% and, for a single comparison, exactly that; within what 1500 trials can tell (99.9%).
    limit = stats.binom.ppf(0.9995, trials, 0.05)
    assert wrong <= limit
    if methods == 2:
        assert wrong >= stats.binom.ppf(0.0005, trials, 0.05)


def test_a_better_method_is_called_better() -> None:
    generator = np.random.default_rng(1)
    calls = [compare(simulate(generator, 5, 5, effect=0.5), "m0")["m4"].verdict for _ in range(200)]
    assert calls.count("lower") >= 198


def test_the_interval_and_the_p_value_say_the_same() -> None:
    generator = np.random.default_rng(2)
    seen = set()
    for _ in range(300):
        for difference in compare(simulate(generator, 4, 4, effect=0.08), "m0").values():
            assert difference.low is not None and difference.high is not None and difference.p is not None
            outside = difference.low > 0 or difference.high < 0
            assert outside == (difference.verdict != "no difference shown") == (difference.p < 0.05)
            seen.add(difference.verdict)
    assert seen >= {"lower", "no difference shown"}


def test_one_comparison_is_scipys_paired_test() -> None:
    ours, theirs = [1.0, 1.2, 0.9, 1.1], [1.3, 1.4, 1.0, 1.5]
    difference = compare({"a": dict(enumerate(ours)), "b": dict(enumerate(theirs))}, "b")["a"]
    reference = stats.ttest_rel(ours, theirs)
    interval = reference.confidence_interval(0.95)
    assert difference.p == pytest.approx(reference.pvalue)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_holms_correction_by_hand() -> None:
    """p-values of .01, .02 and .2 of three comparisons become .03, .04 and .2."""
    base = dict.fromkeys(range(6), 0.0)
    values = {"base": base}
    shape = np.array([-1.0, 1, -1, 1, -1, 1])
    for name, p in (("a", 0.01), ("b", 0.02), ("c", 0.2)):
        t = stats.t.ppf(1 - p / 2, 5)
        values[name] = dict(enumerate(shape + t * stats.sem(shape)))
    assert {n: d.p for n, d in compare(values, "base").items()} == pytest.approx(
        {"a": 0.03, "b": 0.04, "c": 0.2}
    )


def test_seeds_are_paired_by_their_number() -> None:
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.5}, "b": {2: 3.0, 1: 1.0, 7: 100.0}}
    difference = compare(values, "b")["a"]
    assert difference.mean == pytest.approx(0.75) and difference.count == 2


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ({0: 1.0}, "not tested"),
        ({0: 2.0, 1: 2.0}, "not tested"),
        ({0: 1.0, 1: 1.0}, "no difference shown"),
    ],
)
def test_too_little_to_test(ours: dict[int, float], verdict: str) -> None:
    """One seed, and differences without any spread."""
    difference = compare({"a": ours, "b": {0: 1.0, 1: 1.0}}, "b")["a"]
    assert difference.verdict == verdict and difference.p is None and difference.low is None


def test_estimate() -> None:
    assert estimate([2.0]).half_width is None
    three = estimate([1.0, 2.0, 3.0])
    assert three.mean == 2 and three.half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert three.half_width > estimate([1.0, 2.0, 3.0], 0.9).half_width


def test_pareto_front() -> None:
    points = {
        "cheap": (1.0, 5.0),
        "bad": (2.0, 6.0),
        "middle": (2.0, 3.0),
        "tied": (2.0, 3.5),
        "best": (9.0, 1.0),
    }
    assert pareto_front(points) == ["cheap", "middle", "best"]
    assert pareto_front({}) == []


def test_margins_ask_whether_losses_are_equal() -> None:
    """Against SciPy's tests of each side; no difference shown is not the same as equal."""
    rng = np.random.default_rng(0)
    base = dict(enumerate(rng.normal(1.0, 0.2, 8)))
    noise = {"near": 0.004, "lower": 0.004, "vague": 0.2}
    shift = {"near": 0.0, "lower": -0.1, "vague": 0.0}
    values = {
        name: {seed: loss + shift[name] + rng.normal(0, noise[name]) for seed, loss in base.items()}
        for name in noise
    }
    values["base"] = base
    margins = compare_margins(values, "base", 0.02)
    assert {name: margin.verdict for name, margin in margins.items()} == {
        "near": "equal",
        "lower": "not worse",
        "vague": "not shown",
    }
    assert compare(values, "base")["vague"].verdict == "no difference shown"
    differences = np.array([values["vague"][seed] - base[seed] for seed in base])
    sides = [
        stats.ttest_1samp(differences, 0.02, alternative="less").pvalue,
        stats.ttest_1samp(differences, -0.02, alternative="greater").pvalue,
    ]
    alone = compare_margins({"vague": values["vague"], "base": base}, "base", 0.02)["vague"]
    assert (alone.not_worse_p, alone.equal_p) == (pytest.approx(sides[0]), pytest.approx(max(sides)))
    one_seed = compare_margins({"a": {0: 1.0}, "b": {0: 1.0}}, "b", 0.02)["a"]
    assert one_seed.verdict == "not tested"


@pytest.mark.parametrize("methods", [1, 4])
def test_methods_at_the_margin_are_called_equal_at_the_stated_rate_at_most(methods: int) -> None:
    """Any of several at the margin, which without a correction would be at nearly four times that rate."""
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(400):
        base = dict(enumerate(rng.normal(1.0, 0.2, 5)))
        values = {
            f"other-{i}": {seed: loss + 0.02 + rng.normal(0, 0.01) for seed, loss in base.items()}
            for i in range(methods)
        }
        margins = compare_margins({**values, "base": base}, "base", 0.02)
        called += any(margin.verdict != "not shown" for margin in margins.values())
    assert called / 400 <= 0.08, "5%, but for chance"


def test_what_shares_no_seed_with_the_baseline_is_left_out() -> None:
    values = {"a": {}, "b": {0: 1.0, 1: 1.0}, "c": {7: 1.0}}
    assert compare(values, "b") == {} and compare_margins(values, "b", 0.1) == {}
