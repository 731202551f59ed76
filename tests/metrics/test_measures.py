from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from layersample import ConfigError
from layersample.metrics import (
    METRICS,
    DegenerateMatrixError,
    alpha,
    alpha_hat,
    hill,
    log_alpha_norm,
    measure_weight,
    spectrum,
    stable_rank,
)
from layersample.metrics.reference import measure_with_weightwatcher

Metric = Callable[[Tensor], float]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


AWKWARD = {
    "square": random_weight(64, 64),
    "wide": random_weight(24, 200),
    "tall": random_weight(200, 24),
    "bfloat16": random_weight(64, 48).bfloat16(),
    "8 eigenvalues": random_weight(8, 30),
    "19 eigenvalues": random_weight(19, 30),
    "20 eigenvalues": random_weight(20, 30),
    "rank 30 of 64": random_weight(64, 30) @ random_weight(30, 64, seed=1),
    "rank 12 of 64": random_weight(64, 12) @ random_weight(12, 64, seed=1),
    "small values": random_weight(64, 64) * 1e-3,
    "large values": random_weight(64, 64) * 1e4,
    "heavy tail": random_weight(100, 60) * torch.logspace(-4, 2, 60),
    "outlier": random_weight(64, 64) + 100.0,
    "duplicated rows": random_weight(40, 64).repeat(2, 1),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_they_agree_with_weightwatcher(name: str) -> None:
    names = ("alpha", "alpha_hat", "log_alpha_norm", "stable_rank")
    [(expected, problems)] = measure_with_weightwatcher([AWKWARD[name]], names)
    assert not problems
    assert measure_weight(AWKWARD[name], names) == pytest.approx(expected, abs=1e-6, rel=1e-9)


def test_hill_equals_its_formula() -> None:
    for weight in (random_weight(30, 30), random_weight(31, 40), random_weight(3, 5)):
        values = spectrum(weight)
        i = len(values) // 2
        n = len(values) - i
        naive = 1 + n / (sum(math.log(v) for v in values[i:]) - n * math.log(values[i]))
        assert hill(weight) == pytest.approx(naive, rel=1e-12)


def test_hill_depends_on_the_shape_as_published() -> None:
    assert hill(random_weight(512, 512)) == pytest.approx(2.12, abs=0.05)
    assert hill(random_weight(512, 128)) == pytest.approx(3.50, abs=0.1)


def test_stable_rank() -> None:
    assert stable_rank(torch.eye(7)) == pytest.approx(7.0)
    assert stable_rank(torch.ones(7, 9)) == pytest.approx(1.0)


def test_log_alpha_norm_does_not_overflow() -> None:
    weight = random_weight(200, 8) * 0.01 + 3e3 * torch.linalg.qr(random_weight(200, 8, seed=2))[0]
    assert alpha(weight) > 100  # (9·10⁶)^alpha is far above the largest float64
    assert math.isfinite(log_alpha_norm(weight))
    assert log_alpha_norm(weight) == pytest.approx(alpha_hat(weight), abs=1.0)


def test_fused_experts_take_the_mean() -> None:
    weight = random_weight(3, 20, 30)
    for metric in (alpha, alpha_hat, hill, log_alpha_norm, stable_rank):
        assert metric(weight) == pytest.approx(np.mean([metric(expert) for expert in weight]))


def test_one_decomposition_gives_all_metrics() -> None:
    weight = random_weight(40, 40)
    functions: dict[str, Metric] = {
        "alpha": alpha,
        "alpha_hat": alpha_hat,
        "hill": hill,
        "log_alpha_norm": log_alpha_norm,
        "stable_rank": stable_rank,
    }
    assert measure_weight(weight, METRICS) == {name: function(weight) for name, function in functions.items()}


DEGENERATE: dict[str, tuple[Tensor, dict[Metric, str | None]]] = {
    "1 x n": (random_weight(1, 50), {alpha: "at least 8 .* 1 of 1 are", hill: "differ", stable_rank: None}),
    "n x 1": (random_weight(50, 1), {alpha: "at least 8 .* 1 of 1 are", hill: "differ", stable_rank: None}),
    "all equal": (torch.full((30, 40), 0.7), {alpha: "1 of 30 are", hill: "1 is", stable_rank: None}),
    "all zero": (
        torch.zeros(30, 40),
        {alpha: "aren't zero, but all of them are", hill: "aren't zero", stable_rank: "aren't zero"},
    ),
    "rank 5": (
        random_weight(40, 5) @ random_weight(5, 40, seed=1),
        {alpha: "5 of 40 are", hill: "20 of 40 eigenvalues, but 5 are", stable_rank: None},
    ),
    "too few": (random_weight(7, 40), {alpha: "7 of 7 are", hill: None, stable_rank: None}),
    "too small": (random_weight(40, 40) * 1e-6, {alpha: "0 of 40 are", hill: None, stable_rank: None}),
    "orthogonal": (
        torch.linalg.qr(random_weight(40, 40).double())[0],
        {alpha: "eigenvalues that differ", hill: "eigenvalues that differ", stable_rank: None},
    ),
    "NaN": (
        random_weight(40, 40).index_fill(0, torch.tensor([3]), math.nan),
        {alpha: "40 of 1600 values .* NaN", hill: "NaN", stable_rank: "NaN"},
    ),
    "infinite": (
        random_weight(40, 40).index_fill(0, torch.tensor([3]), math.inf),
        {alpha: "must be finite", hill: "infinite", stable_rank: "infinite"},
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_matrix_is_named_and_never_minus_one(name: str) -> None:
    weight, expected = DEGENERATE[name]
    for metric, message in expected.items():
        if message is None:
            assert metric(weight) >= 1.0
        else:
            with pytest.raises(DegenerateMatrixError, match=message):
                metric(weight)


def test_a_degenerate_expert_is_named() -> None:
    weight = random_weight(3, 20, 30)
    weight[1] = 0.0
    with pytest.raises(DegenerateMatrixError, match=r"alpha of expert 1 of a weight \(3, 20, 30\)"):
        alpha(weight)


def test_an_unknown_metric_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="Unknown metric 'alhpa'. Did you mean 'alpha'"):
        measure_weight(random_weight(9, 9), ["alhpa"])
    with pytest.raises(ConfigError, match="at least one of"):
        measure_weight(random_weight(9, 9), [])


@pytest.mark.slow
def test_alpha_agrees_with_weightwatcher_on_all_of_smollm2(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    from layersample.metrics import layer_metrics

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    own = layer_metrics(model, metrics=("alpha",), cache=False)
    reference = layer_metrics(model, metrics=("alpha",), backend="weightwatcher")
    assert len(own.matrices) == 210
    for ours, theirs in zip(own.matrices, reference.matrices, strict=True):
        assert ours.name == theirs.name
        assert ours.values["alpha"] == pytest.approx(theirs.values["alpha"], abs=1e-6)
