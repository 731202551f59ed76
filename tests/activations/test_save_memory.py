from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from layersample import ConfigError, LayerScheduler
from layersample.activations.save_memory import save_memory
from layersample.versions import checkpoint_activations
from tests.helpers import Given, make_batch, make_llama

EVERYTHING: dict[str, Any] = {"loss_chunk": 5, "recompute": True, "gradient_checkpointing": True}


def is_checkpointing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gradients(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with save_memory(model, **{"loss_chunk": None, "recompute": False, **options}):
        model(**make_batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("off", [None, 0])
def test_nothing_is_switched_on_that_was_not_asked_for(off: int | None) -> None:
    model = make_llama().train()
    with save_memory(model, loss_chunk=off, recompute=False):
        assert model(**make_batch()).logits is not None
        assert not hooks(model) and not is_checkpointing(model)


def test_each_and_all_together_train_alike() -> None:
    model = make_llama().train()
    plain = gradients(model)
    for options in ({"loss_chunk": 5}, {"recompute": True}, {"gradient_checkpointing": True}, EVERYTHING):
        saved = gradients(model, **options)
        assert plain.keys() == saved.keys()
        for name in plain:
            torch.testing.assert_close(saved[name], plain[name], rtol=1e-4, atol=1e-6)


def test_everything_is_put_back_when_it_is_closed() -> None:
    model = make_llama().train()
    saved = save_memory(model, **EVERYTHING)
    assert is_checkpointing(model) and hooks(model)
    assert model(**make_batch()).logits is None
    saved.close()
    saved.close()
    assert not is_checkpointing(model) and not hooks(model)
    assert model(**make_batch()).logits is not None


def test_nothing_stays_where_one_of_them_is_refused() -> None:
    model = make_llama().model.train()  # no head
    with pytest.raises(ConfigError, match="needs a language model with a linear head"):
        save_memory(model, **EVERYTHING)
    assert not is_checkpointing(model) and not hooks(model)
    with pytest.raises(
        ConfigError, match="needs a model of transformers that supports it, but Linear doesn't"
    ):
        save_memory(nn.Linear(2, 2), loss_chunk=None, recompute=False, gradient_checkpointing=True)


def test_checkpointing_that_is_on_already_stays_as_it_is() -> None:
    model = make_llama().train()
    checkpoint_activations(model, {"use_reentrant": True})
    before = hooks(model)
    with save_memory(model, loss_chunk=None, recompute=False, gradient_checkpointing=True):
        pass
    assert is_checkpointing(model) and hooks(model) == before


@pytest.mark.parametrize("first", [False, True])
def test_backward_ends_at_the_lowest_active_layer_whichever_comes_first(first: bool) -> None:
    model = make_llama().train()
    runs = [0] * 4
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    saved = save_memory(model, **EVERYTHING) if first else None
    optimizer = torch.optim.SGD(model.parameters())
    with LayerScheduler(model, optimizer, Given((2,)), num_active=1, embeddings="freeze"):
        saved = saved or save_memory(model, **EVERYTHING)
        runs[:] = [0] * 4  # a chunked loss tries the model on a few tokens
        model(**make_batch()).loss.backward()
    saved.close()
    assert runs == [1, 1, 2, 2]  # 2: computed again in backward


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_goes_through_peft() -> None:
    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"])).train()
    plain = gradients(model)
    saved = gradients(model, **EVERYTHING)
    assert plain.keys() == saved.keys()
    assert all(torch.allclose(saved[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)
