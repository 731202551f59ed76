from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from layersample import LayerScheduler
from layersample.versions import checkpoint_activations
from tests.helpers import Given, make_batch, make_llama, weights_of


def run(
    checkpointing: bool | None, active: tuple[int, ...], embeddings: Any = "freeze"
) -> tuple[Any, list[int]]:
    """Gradients, and how often each layer ran: checkpointing None is off, else whether it is reentrant."""
    model = make_llama()
    model.train()
    if checkpointing is not None:
        checkpoint_activations(model, {"use_reentrant": checkpointing})
    forwards = [0] * 4
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: forwards.__setitem__(i, forwards[i] + 1))
    optimizer = torch.optim.SGD(model.parameters())
    with LayerScheduler(model, optimizer, Given(active), num_active=1, embeddings=embeddings):
        model(**make_batch(), use_cache=False).loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, forwards


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # below the lowest active layer
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("active", [(0,), (2,), (1, 3), (3,)])
def test_gradients_are_the_same_and_backward_still_ends_at_the_lowest_layer(
    reentrant: bool, active: tuple[int, ...]
) -> None:
    plain, _ = run(None, active)
    checkpointed, forwards = run(reentrant, active)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert forwards == [1 if i < min(active) else 2 for i in range(4)]  # 2: computed again in backward


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_trained_embedding_gets_its_gradient(reentrant: bool) -> None:
    plain, _ = run(None, (2,), "train")
    checkpointed, _ = run(reentrant, (2,), "train")
    assert "model.embed_tokens.weight" in checkpointed
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_trains_alike_over_several_periods(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = make_llama()
        model.train()
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            checkpoint_activations(model, kwargs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = LayerScheduler(model, optimizer, "lisa", period=1, embeddings="sample", check=True)
        for step in range(6):
            model(**make_batch(step), use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        results.append(weights_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_everything_is_put_back_at_the_end() -> None:
    model = make_llama()
    checkpoint_activations(model)
    assert model.get_input_embeddings()._forward_hooks
    scheduler = LayerScheduler(model, torch.optim.SGD(model.parameters()), "lisa")
    assert not model.get_input_embeddings()._forward_hooks
    scheduler.close()
    assert model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("active", [(0,), (1,), (2,), (3,), (1, 2)])
@pytest.mark.parametrize("embeddings", ["freeze", "train"])
@pytest.mark.parametrize(
    "kind", ["t5", "bart"]
)  # the decoder gets the encoder's output by position, by keyword
def test_an_encoder_decoder_has_its_gradients(kind: str, embeddings: Any, active: tuple[int, ...]) -> None:
    model = make_encoder_decoder(kind)
    found = []
    for reentrant in (False, True):
        checkpoint_activations(model, {"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters())
        with LayerScheduler(model, optimizer, Given(active), num_active=len(active), embeddings=embeddings):
            torch.manual_seed(1)  # of dropout
            tokens = torch.arange(3, 17).reshape(2, 7)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():  # the order in which gradients are added is another
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


def make_encoder_decoder(kind: str) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 64, "d_model": 16}
    if kind == "t5":
        options |= {"num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
        model: Any = T5ForConditionalGeneration(T5Config(**options))
    else:
        for side in ("encoder", "decoder"):
            options |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
        model = BartForConditionalGeneration(BartConfig(**options, max_position_embeddings=32))
    return model.double().train()
