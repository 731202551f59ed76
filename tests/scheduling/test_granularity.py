"""Units smaller than a layer, through the whole scheduler: one mechanism, so all else goes with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from layersample import (
    LayerSampler,
    LayerScheduler,
    SamplingContext,
    SelectiveRecompute,
    StepInBackward,
    TrainConfig,
    layer_costs,
    plan,
)
from layersample.layers.find import find_layers
from layersample.layers.rules import arrange
from layersample.versions import checkpoint_activations
from tests.helpers import Given, causal_lm, make_batch, make_llama, weights_of

SAMPLE: Any = dict.fromkeys(("embeddings", "head", "norm", "other"), "sample")
FREEZE: Any = dict.fromkeys(("embeddings", "head", "norm", "other"), "freeze")


def steps(
    model: Any, optimizer: torch.optim.Optimizer, scheduler: LayerScheduler | None, numbers: range
) -> None:
    for step in numbers:
        loss = model(**make_batch(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(loss=loss)
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def trained(sampler: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    model = make_llama(dtype=dtype)
    optimizer = adamw(model)
    with LayerScheduler(model, optimizer, sampler, **{"period": 2, "check": True, **options}) as scheduler:
        steps(model, optimizer, scheduler, range(6))
    return weights_of(model)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("sampler", ["lisa", "full", "cyclic"])
@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_with_every_unit_active_it_is_full_fine_tuning_to_the_bit(sampler: str, granularity: Any) -> None:
    model = make_llama()
    count = len(arrange(model, find_layers(model), SAMPLE, granularity=granularity).sampled)
    optimizer = adamw(model)
    steps(model, optimizer, None, range(6))
    with_units = trained(sampler, granularity=granularity, num_active=count, **SAMPLE)
    assert_same(with_units, weights_of(model))
    if sampler != "full":
        assert_same(trained(sampler, granularity=granularity, draw_budget="100%", **SAMPLE), with_units)


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_what_isn_t_drawn_doesn_t_move(granularity: Any) -> None:
    model = make_llama()
    optimizer = adamw(model)
    units = arrange(model, find_layers(model), FREEZE, granularity=granularity).sampled
    with LayerScheduler(
        model, optimizer, "lisa", granularity=granularity, num_active=2, period=2, check=True, **FREEZE
    ) as scheduler:
        for step in range(0, 8, 2):
            before = weights_of(model)
            own = {name for i in scheduler.active for name in units[i].parameters}
            assert {name for name, p in model.named_parameters() if p.requires_grad} == own
            steps(model, optimizer, scheduler, range(step, step + 2))
            moved = {
                name for name, value in weights_of(model).items() if not torch.equal(value, before[name])
            }
            assert moved == own
        assert len(scheduler.staleness) == len(scheduler.layers) == len(units)
        assert scheduler.coverage > 2 / len(units)


VARIANTS: list[dict[str, Any]] = [
    {"projection": "galore", "projection_options": {"rank": 4}},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "projection": "fira", "projection_options": {"rank": 4}},
    {"state": "offload"},
    {"state": "keep"},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_units_that_make_up_a_layer_are_the_layer_to_the_bit(variant: dict[str, Any]) -> None:
    """Projection, masters and the optimizer's state know parameters, not layers."""
    whole = trained(Given((0, 2), (1,)), **variant)
    names = [
        unit.layer
        for unit in arrange(make_llama(), find_layers(make_llama()), FREEZE, granularity="tensor").sampled
    ]
    sets = [
        tuple(i for i, name in enumerate(names) if name.rpartition(".")[2] in wanted)
        for wanted in ("02", "1")
    ]
    assert_same(trained(Given(*sets), granularity="tensor", **variant), whole)


@pytest.mark.parametrize(
    "variant", [{"step_in_backward": StepInBackward()}, {"frozen_weights": "int8"}, *VARIANTS[:3]]
)
@pytest.mark.parametrize("budget", [{"num_active": 3}, {"draw_budget": "15%"}])
def test_all_else_goes_with_units(variant: dict[str, Any], budget: dict[str, Any]) -> None:
    start = weights_of(make_llama(dtype=variant.get("dtype", torch.float32)))
    ended = trained("lisa", granularity="module", **variant, **budget, **FREEZE)
    assert any(not torch.equal(value, start[name]) for name, value in ended.items())
    if "step_in_backward" in variant:
        assert_same(ended, trained("lisa", granularity="module", **budget, **FREEZE))


def test_rounded_weights_of_one_module_are_apart() -> None:
    """Fused experts: one of their two weights trains exactly, while the other one is rounded."""
    model = causal_lm("mixtral", num_local_experts=2).float()
    optimizer = adamw(model)
    units = arrange(model, find_layers(model), FREEZE, granularity="tensor").sampled
    down = next(i for i, unit in enumerate(units) if unit.name.endswith("experts.down_proj"))
    gate = next(i for i, unit in enumerate(units) if unit.name.endswith("experts.gate_up_proj"))
    start = weights_of(model)
    with LayerScheduler(
        model,
        optimizer,
        Given((down,), (gate,)),
        granularity="tensor",
        period=1,
        frozen_weights="int8",
        **FREEZE,
    ) as scheduler:
        steps(model, optimizer, scheduler, range(1))
        assert scheduler.active == (gate,)
        steps(model, optimizer, scheduler, range(1, 2))
    ended = weights_of(model)
    moved = {name for name in start if not torch.equal(start[name], ended[name])}
    assert moved == {units[down].name, units[gate].name}


def test_backward_ends_at_the_lowest_active_unit() -> None:
    model = make_llama()
    seen: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_full_backward_hook(
            lambda module, before, after, number=number: seen.append(number)
        )
    optimizer = adamw(model)
    names = [u.name for u in arrange(model, find_layers(model), FREEZE, granularity="module").sampled]
    lowest = names.index("model.layers.2.self_attn.o_proj")
    with (
        LayerScheduler(
            model, optimizer, Given((lowest,)), granularity="module", period=9, **FREEZE
        ) as scheduler,
        SelectiveRecompute(model),
    ):
        steps(model, optimizer, scheduler, range(1))
    assert sorted(seen) == [2, 3]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_active_units(reentrant: bool) -> None:
    plain = trained("lisa", granularity="module", num_active=3, seed=3, **FREEZE)
    model = make_llama().train()
    checkpoint_activations(model, {"use_reentrant": reentrant})
    optimizer = adamw(model)
    with LayerScheduler(
        model, optimizer, "lisa", granularity="module", num_active=3, seed=3, period=2, **FREEZE
    ) as scheduler:
        steps(model, optimizer, scheduler, range(6))
    assert_same(weights_of(model), plain)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("lisa", {}), ("misa", {}), ("bandit", {}), ("blockllm", {"patience": 2}), ("adagradselect", {})],
)
@pytest.mark.parametrize("budget", [{"num_active": 3}, {"draw_budget": "12%"}])
def test_a_resumed_run_is_the_same_to_the_bit(sampler: str, options: dict[str, Any], budget: Any) -> None:
    given: dict[str, Any] = {
        "granularity": "module",
        "period": 2,
        "sampler_options": options,
        **budget,
        **FREEZE,
    }
    model = make_llama()
    optimizer = adamw(model)
    with LayerScheduler(model, optimizer, sampler, **given) as scheduler:
        steps(model, optimizer, scheduler, range(9))
        expected, drawn = weights_of(model), scheduler.active
    model = make_llama()
    optimizer = adamw(model)
    with LayerScheduler(model, optimizer, sampler, **given) as scheduler:
        steps(model, optimizer, scheduler, range(5))
        stored = [json.loads(json.dumps(scheduler.state_dict())), model.state_dict(), optimizer.state_dict()]
        resumed = make_llama()
        resumed.load_state_dict(stored[1])
        again = adamw(resumed)
        again.load_state_dict(stored[2])
    with LayerScheduler(resumed, again, sampler, state_dict=stored[0], **given) as scheduler:
        steps(resumed, again, scheduler, range(5, 9))
        assert scheduler.active == drawn
    assert_same(weights_of(resumed), expected)


def test_a_run_is_resumed_with_the_granularity_and_budget_it_was_begun_with() -> None:
    model = make_llama()
    with LayerScheduler(model, adamw(model), granularity="block", draw_budget="30%") as scheduler:
        state = scheduler.state_dict()
    for name, value in (("granularity", "module"), ("draw_budget", "31%")):
        given: Any = {"granularity": "block", "draw_budget": "30%", name: value}
        with pytest.raises(ValueError, match=f"must be resumed with the {name} it was begun with"):
            LayerScheduler(model, adamw(model), state_dict=state, **given)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("owlore", {"metric": "outlier", "threshold": 3.0}),
        ("owlore", {"metric": "alpha"}),
        ("owlore", {"metric": "hill"}),
        ("lora_norm", {"probe_steps": 1, "probe_rank": 2}),
        ("spectrum", {}),
    ],
)
@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_samplers_that_measure_do_so_for_each_unit(
    sampler: str, options: dict[str, Any], granularity: Any
) -> None:
    model = make_llama()
    start = weights_of(model)
    with LayerScheduler(
        model,
        adamw(model),
        sampler,
        sampler_options={**options, "min_probability": 0.001},
        granularity=granularity,
        batches=lambda: [make_batch(step) for step in range(2)],
        **FREEZE,
    ) as scheduler:
        measured: Any = scheduler.sampler
        matrices = [u for u in scheduler.layers if "norm" not in u]
        assert set(measured.scores) == set(matrices) and len(set(measured.scores.values())) > 2
    assert_same(weights_of(model), start)


def test_a_norm_of_the_same_kind_is_what_a_unit_is_compared_with() -> None:
    """Spectrum's and Hill's scores are relative to the same matrix in all layers, not to all matrices."""
    scores: list[dict[str, float]] = []
    for granularity in ("layer", "module"):
        model = make_llama()
        given: Any = {"granularity": granularity, **FREEZE}
        with LayerScheduler(model, adamw(model), "spectrum", **given) as scheduler:
            scores.append(scheduler.sampler.scores)  # type: ignore[attr-defined]
    for layer, score in scores[0].items():
        own = [value for name, value in scores[1].items() if name.startswith(layer + ".")]
        assert sum(own) / len(own) == pytest.approx(score)


def test_costs_are_those_of_units() -> None:
    model = make_llama()
    units = arrange(model, find_layers(model), FREEZE, granularity="module")
    costs = layer_costs(model, units)
    assert len(costs.flops) == 28 and list(costs.flops) != sorted(costs.flops)
    assert costs.flops[-1] == 2 * 16 * 32  # the top matrix: its input's gradient, and its own
    assert costs.trained_bytes[1] == 3 * 4 * 16 * 8


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_a_plan_is_of_units(granularity: Any) -> None:
    config = TrainConfig(batch_size=1, max_length=16, granularity=granularity, draw_budget="20%", **FREEZE)
    planned = plan(make_llama().config, config, baselines=False)
    assert all(".self_attn" in name or ".mlp" in name or "norm" in name for name in planned.worst.layers)
    total = planned.parameters
    assert 0 < planned.worst.trainable <= 0.2 * total and planned.typical.trainable <= 0.2 * total
    more = plan(make_llama().config, config.model_copy(update={"draw_budget": "60%"}), baselines=False)
    assert more.peak_bytes > planned.peak_bytes


def test_a_budget_of_memory_and_one_of_draws_are_not_given_together() -> None:
    with pytest.raises(ValueError, match="budget chooses num_active once, and draw_budget bounds each draw"):
        TrainConfig(budget="1GiB", draw_budget="3%")


def test_a_sampler_of_one_s_own_sees_units() -> None:
    class Queries(LayerSampler):
        """Train the query matrices alone."""

        def sample(self, context: SamplingContext) -> list[int]:
            return [index for index, name in enumerate(context.layers) if name.endswith("q_proj")]

    model = make_llama()
    with LayerScheduler(model, adamw(model), Queries(), granularity="module", **FREEZE) as scheduler:
        assert scheduler.active_layers == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(4))
