from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layersample import ConfigError, find_layers
from layersample.metrics import has_lora, probe_lora
from tests.helpers import make_batch, make_llama


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [make_batch(i) for i in range(count)]


def test_measures_every_layer_and_is_repeatable() -> None:
    first = probe_lora(make_llama(), batches(), steps=3, rank=2)
    second = probe_lora(make_llama(), batches(), steps=3, rank=2)
    assert list(first) == [layer.name for layer in find_layers(make_llama()).layers]
    assert first == second
    assert all(norms.ratio > 0 for norms in first.values())


def test_leaves_the_model_bit_by_bit_as_it_was() -> None:
    model = make_llama().eval()
    model.model.layers[1].requires_grad_(False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes, random_state = set(vars(model)), torch.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    parameters = [id(p) for p in model.parameters()]
    probe_lora(model, batches(), steps=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert [id(p) for p in model.parameters()] == parameters, "an optimizer still holds them"
    assert [name for name, _ in model.named_modules()] == names
    assert not has_lora(model) and not model.training and set(vars(model)) == attributes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_is_taken_away_after_an_error_too() -> None:
    model = make_llama()
    with pytest.raises(ValueError, match="batch_size"):
        probe_lora(
            model,
            [
                {
                    "input_ids": torch.zeros(1, 3, dtype=torch.long),
                    "labels": torch.zeros(2, 3, dtype=torch.long),
                }
            ],
        )
    assert not has_lora(model) and all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_no_number() -> None:
    model = make_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="loss of the LoRA probe must be finite, but is nan at step 1"):
        probe_lora(model, batches())


def test_no_batches() -> None:
    with pytest.raises(ConfigError, match="at least one training batch, but got none"):
        probe_lora(make_llama(), [])


def test_conv1d(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    tokens = torch.arange(12).view(2, 6)
    norms = probe_lora(model, [{"input_ids": tokens, "labels": tokens}], steps=2, rank=2)
    assert len(norms) == 2 and all(n.delta > 0 for n in norms.values())
