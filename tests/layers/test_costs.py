from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerScheduler, SamplingContext, create_sampler, find_layers, layer_costs
from layersample.layers.costs import count_elements
from layersample.layers.rules import arrange
from tests.helpers import make_batch, make_llama

LAYER = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16
OUTPUTS = 16 * 2 + 8 * 2 + 32 * 2 + 16
RULES: Any = {"embeddings": "freeze", "head": "freeze", "norm": "freeze", "other": "freeze"}


def costs_of(tie: bool = False, **rules: Any) -> Any:
    model = make_llama(tie=tie)
    chosen: Any = {**RULES, **rules}
    return layer_costs(model, arrange(model, find_layers(model), chosen))


def test_a_layer_costs_its_weights_and_the_way_down_to_it() -> None:
    costs = costs_of()
    assert costs.flops == tuple((4 - i) * LAYER + LAYER for i in range(4))
    assert costs.trained_bytes == (3 * 4 * LAYER,) * 4
    assert costs.activation_bytes == tuple((4 - i) * 4 * OUTPUTS for i in range(4))
    assert costs.memory(10)[3] == 3 * 4 * LAYER + 10 * 4 * OUTPUTS


def test_where_the_embedding_trains_anyway_the_way_is_paid_for() -> None:
    costs = costs_of(embeddings="train")
    assert len(set(costs.flops)) == len(set(costs.activation_bytes)) == 1


def test_weights_that_never_train_are_passed_and_get_no_gradient() -> None:
    """As those beside an adapter: backward goes through them, but they have no gradient and no state."""
    model = make_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "layers" not in name)
    units = arrange(model, find_layers(model), RULES)
    costs, queries = layer_costs(model, units), 16 * 16
    assert costs.flops == tuple((4 - i) * LAYER + queries for i in range(4))
    assert costs.trained_bytes == (3 * 4 * queries,) * 4 and count_elements(model, units) == (queries,) * 4
    assert costs.activation_bytes == costs_of().activation_bytes


@pytest.mark.parametrize("tie", [False, True])
def test_a_sampled_embedding_costs_the_whole_way(tie: bool) -> None:
    costs = costs_of(tie, embeddings="sample", head="sample")
    assert len(costs.flops) == 5 + (not tie)
    assert costs.flops[0] >= 4 * LAYER and costs.trained_bytes[0] == 3 * 4 * 260 * 16


def test_a_sampled_norm_costs_its_own_few_weights() -> None:
    costs = costs_of(norm="sample")
    assert costs.flops[3:] == (2 * LAYER + 16, 2 * 16)
    model = make_llama()
    options: Any = {"weights": "uniform", "cost": "flops"}
    rules: Any = {**RULES, "norm": "sample"}
    with LayerScheduler(
        model, torch.optim.AdamW(model.parameters()), "prior", sampler_options=options, **rules
    ) as scheduler:
        inclusion = scheduler.inclusion_probabilities
        assert inclusion is not None and sum(inclusion) == pytest.approx(2) and max(inclusion) == inclusion[4]


def context(**more: Any) -> SamplingContext:
    return SamplingContext(layers=tuple("abcd"), num_active=2, costs=costs_of(), **more)


@pytest.mark.parametrize("cost", ["flops", "memory"])
def test_weights_are_divided_by_cost_and_stay_above_the_floor(cost: str) -> None:
    sampler = create_sampler("prior", {"weights": "uniform", "cost": cost, "min_probability": 0.1})
    costs = costs_of().flops if cost == "flops" else costs_of().memory(1024)
    inverse = [1 / c for c in costs]
    expected = [0.1 + 0.6 * value / sum(inverse) for value in inverse]
    assert sampler.probabilities(context()) == pytest.approx(expected, rel=1e-12)  # type: ignore[attr-defined]
    assert expected == sorted(expected), "the top is cheapest"


def test_no_layer_is_too_dear() -> None:
    sampler = create_sampler("prior", {"weights": [1e-9, 1, 1, 1], "cost": "flops"})
    assert min(sampler.probabilities(context())) >= 0.1 / 4  # type: ignore[attr-defined]
    without = create_sampler("prior", {"weights": [1e-9, 1, 1, 1]})
    assert min(without.probabilities(context())) < 1e-9  # type: ignore[attr-defined]


@pytest.mark.parametrize("draw", ["sequential", "systematic"])
def test_true_inclusion_stays_exact(draw: str) -> None:
    sampler = create_sampler("prior", {"weights": "uniform", "cost": "flops", "draw": draw})
    counts, rounds, first = torch.zeros(4), 4000, context()
    for round in range(rounds):
        counts[list(sampler.sample(replace(first, round=round)))] += 1
    inclusion = sampler.inclusion_probabilities(first)
    assert inclusion is not None and sum(inclusion) == pytest.approx(2)
    assert (counts / rounds).tolist() == pytest.approx(inclusion, abs=4 * (0.25 / rounds) ** 0.5)


def test_in_a_run() -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"weights": "uniform", "cost": "memory", "cost_tokens": 24}
    with LayerScheduler(
        model, optimizer, "prior", sampler_options=options, embeddings="freeze", head="freeze", period=1
    ) as scheduler:
        found = scheduler.inclusion_probabilities
        assert found is not None and found == sorted(found) and found[0] < found[-1]
        model(**make_batch()).loss.backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "time"}, "cost.*should be 'none', 'flops' or 'memory', but got 'time'"),
        ({"cost_tokens": 0}, "cost_tokens must be at least 1 token"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_sampler("prior", {"weights": "uniform", **options})


def test_a_context_without_costs_is_told() -> None:
    sampler = create_sampler("prior", {"weights": "uniform", "cost": "flops"})
    with pytest.raises(ConfigError, match="needs the costs of the layers, but the context has none"):
        sampler.sample(SamplingContext(layers=("a", "b"), num_active=1))
