"""IST: its formula by hand, what damping does, and that it leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerScheduler, Measurement, SamplingContext, create_sampler, find_layers
from layersample.metrics.damping import damped, damped_losses
from layersample.sampling.calibration import OwnLoss
from tests.helpers import make_batch, make_llama, weights_of


def measurement(model: Any, round: int, **more: Any) -> Measurement:
    layers = find_layers(model)
    names = tuple(layer.name for layer in layers.layers)
    given: dict[str, Any] = {
        "batches": lambda: [make_batch(step) for step in range(3)],
        "round": round,
        **more,
    }
    return Measurement(model, layers, names, 2, names, **given)


def test_scores_move_by_rewards_relative_to_their_mean() -> None:
    from layersample_strategies.ist import update_scores

    # Rewards 1/2 and 1/4, mean 3/8; σ(0)(1 − σ(0)) = 1/4: ±10/8/4 = ±.3125. b is in both sets.
    once = update_scores({}, [["a", "b"], ["b", "c"]], [math.log(2), math.log(4)], 10.0)
    assert once == pytest.approx({"a": 0.3125, "b": 0.0, "c": -0.3125})
    # σ(.3125) = .577495: a slope of .243995; rewards 1/4 and 1/2, of which a gets the smaller one.
    twice = update_scores(once, [["a"], ["c"]], [math.log(4), math.log(2)], 10.0)
    assert twice == pytest.approx({"a": 0.3125 - 0.304993, "b": 0.0, "c": -0.3125 + 0.304993}, abs=1e-5)
    sampler: Any = create_sampler("ist")
    sampler.scores = once
    context = SamplingContext(("a", "b", "c"), 1)
    # σ(−.3125), σ(0) and σ(.3125) add up to 1.5.
    assert sampler.probabilities(context) == pytest.approx([0.281670, 1 / 3, 0.384997], abs=1e-5)


def test_a_layer_that_does_nothing_is_drawn_less_often() -> None:
    model = make_llama(4)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(60)  # so that each matters
        for own in model.model.layers[1].parameters():
            own.zero_()
    sampler: Any = create_sampler("ist", {"probes": 6, "every": 1})
    sampler.scores = {}
    before, mode = weights_of(model), model.training
    for round in range(6):
        sampler.measure(measurement(model, round))
        if round == 0:
            assert sampler.scores == {}, "before the first period nothing is known"
    assert max(sampler.scores, key=sampler.scores.get) == "model.layers.1"
    assert model.training is mode and all(
        torch.equal(value, before[name]) for name, value in weights_of(model).items()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_of_the_loop_s_own_counts() -> None:
    model = make_llama()
    batch = make_batch(0)
    own = OwnLoss({"pairs": None}, lambda given: given(**batch).loss * 2)
    sets = [["model.layers.0"], ["model.layers.1"]]
    plain, twice = damped_losses(model, batch, sets, 0.25), damped_losses(model, own, sets, 0.25)
    assert twice == pytest.approx([2 * loss for loss in plain]) and plain[0] != plain[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_are_damped_where_there_are_some() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(make_llama(), LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    layer = model.base_model.model.model.layers[0]
    held = [getattr(module, "scaling", None) for module in layer.modules()]
    scalings = [
        scaling for scaling in held if isinstance(scaling, dict)
    ]  # attention has one that is a number
    with damped(layer, 0.25):
        assert scalings and all(scaling == {"default": 0.5} for scaling in scalings)
        assert not layer._forward_hooks
    assert all(scaling == {"default": 2.0} for scaling in scalings)


def test_it_trains_in_a_scheduler_and_needs_whole_layers_and_data() -> None:
    def made(**options: Any) -> LayerScheduler:
        model = make_llama()
        return LayerScheduler(model, torch.optim.AdamW(model.parameters()), "ist", **options)

    with pytest.raises(
        ConfigError, match="granularity must be 'layer', but model.layers.0.self_attn is a part"
    ):
        made(granularity="block", batches=[make_batch()])
    with pytest.raises(ConfigError, match="computes losses of calibration batches, but got none"):
        made()
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(
        model, optimizer, "ist", sampler_options={"every": 2}, period=1, batches=[make_batch(9)], check=True
    ) as scheduler:
        for step in range(5):
            model(**make_batch(step), use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert len(scheduler.sampler.scores) == 4  # type: ignore[attr-defined]
