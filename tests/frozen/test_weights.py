"""Frozen weights against a naive model, whose frozen matrices were replaced by their dequantized values."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layersample import ChunkedLoss, ConfigError, SelectiveRecompute, find_layers
from layersample.frozen.formats import FORMATS
from layersample.frozen.weights import FrozenWeights, find_frozen_weights
from layersample.versions import checkpoint_activations
from tests.helpers import causal_lm, make_batch, make_llama, weights_of

FORMAT_NAMES = ("int8", "nf4")
MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def wide(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A model whose matrices are all large enough to be held."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    if kind == "gpt2":
        sizes = {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    if dtype == torch.float64 and "num_local_experts" in options:
        options["experts_implementation"] = "eager"  # the grouped kernels have no float64
    model: nn.Module = causal_lm(kind, **sizes, **options).to(dtype)
    return model


def training_names(model: nn.Module, active: int) -> set[str]:
    layers = find_layers(model).layers
    return {name for name in layers[active].parameters}


def naive(model: nn.Module, names: tuple[str, ...], training: set[str], form: str) -> nn.Module:
    """A copy in which each frozen matrix is what its format makes of it."""
    copied, chosen = copy.deepcopy(model), FORMATS.create(form)
    for name, parameter in copied.named_parameters():
        if name in names and name not in training:
            transposed = type(copied.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            values = parameter.detach().t().contiguous() if transposed else parameter.detach()
            matrices = values.unsqueeze(0) if values.dim() == 2 else values
            rounded = torch.stack(
                [chosen.dequantize(chosen.quantize(m), (m.shape[0], m.shape[1]), m.dtype) for m in matrices]
            ).view(values.shape)
            parameter.data.copy_(rounded.t() if transposed else rounded)
    return copied


def gradients(
    model: nn.Module, training: set[str], extra: Any = None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in training)
        parameter.grad = None
    with extra(model) if extra else contextlib.nullcontext():
        loss = model(**make_batch(), use_cache=False, **kwargs).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def checkpointing(reentrant: bool) -> Any:
    def turn_on(model: Any) -> Any:
        checkpoint_activations(model, {"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return contextlib.nullcontext()

    return turn_on


EXTRAS = {
    "plain": None,
    "checkpointing": checkpointing(False),
    "reentrant": checkpointing(True),
    "recompute": SelectiveRecompute,
    "chunked": ChunkedLoss,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen2": {},
    "mixtral": MOE,
    "gpt_oss": {**MOE, "layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("form", FORMAT_NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_of_a_naive_model(kind: str, form: str, extra: str) -> None:
    model = wide(kind, **MODELS[kind])
    training = training_names(model, 0)
    frozen = FrozenWeights(model, find_layers(model), form)
    reference = gradients(naive(model, frozen.names, training, form), training, EXTRAS[extra])
    frozen.freeze(training)
    found = gradients(model, training, EXTRAS[extra])
    assert found.keys() == reference.keys() and len(found) > 5
    for name, expected in reference.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMAT_NAMES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_in_bfloat16_they_are_equal_to_the_bit(kind: str, form: str) -> None:
    model = wide(kind, torch.bfloat16, **MODELS[kind])
    training = training_names(model, 1)
    frozen = FrozenWeights(model, find_layers(model), form)
    reference = gradients(naive(model, frozen.names, training, form), training)
    frozen.freeze(training)
    found = gradients(model, training)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], expected) for name, expected in reference.items())


@pytest.mark.parametrize("form", FORMAT_NAMES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_under_autocast_they_are_equal_to_the_bit(kind: str, form: str) -> None:
    model = wide(kind, torch.float32)
    training = training_names(model, 0)
    frozen = FrozenWeights(model, find_layers(model), form)
    with torch.autocast("cpu", torch.bfloat16):
        reference = gradients(naive(model, frozen.names, training, form), training)
        frozen.freeze(training)
        found = gradients(model, training)
    for name, expected in reference.items():
        torch.testing.assert_close(found[name], expected, rtol=0 if kind != "gpt2" else 1e-2, atol=1e-4)


@pytest.mark.parametrize("extra", ["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_backward_needs_outlives_a_switch(kind: str, extra: str) -> None:
    model = wide(kind, **MODELS[kind])
    training = training_names(model, 0)
    frozen = FrozenWeights(model, find_layers(model), "nf4")
    reference = gradients(naive(model, frozen.names, training, "nf4"), training)
    frozen.freeze(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in training)
    if extra != "plain":
        checkpointing(extra == "reentrant")(model)
    loss = model(**make_batch(), use_cache=False).loss
    others = training_names(model, 1) | training_names(model, 2)
    frozen.activate(others)
    with torch.no_grad():
        before = {name: model.get_parameter(name).clone() for name in others.intersection(frozen.names)}
        for name in before:
            model.get_parameter(name).fill_(7.0)
        if extra != "plain":  # the forward that runs again sees what is there by then, as anywhere
            frozen.freeze(training)
            frozen.activate(others)
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
    frozen.freeze(training)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in training:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-12, atol=1e-12)


def test_overwritten_codes_are_noticed() -> None:
    model = wide()
    training = training_names(model, 0)
    frozen = FrozenWeights(model, find_layers(model), "int8")
    frozen.freeze(training)
    loss = model(**make_batch(), use_cache=False).loss
    frozen._matrices["model.layers.2.mlp.up_proj.weight"].tensors[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_weight_holds_nothing_and_stays_the_users_parameter(kind: str) -> None:
    model = wide(kind, torch.bfloat16, **MODELS[kind])
    before = {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()}
    values = weights_of(model)
    training = training_names(model, 1)
    frozen = FrozenWeights(model, find_layers(model), "int8")
    assert not frozen.kept or kind in ("mixtral", "gpt_oss")
    frozen.freeze(training)
    assert {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()} == before
    rounded = set(frozen.names) - training
    for name, parameter in model.named_parameters():
        assert (parameter.untyped_storage().nbytes() <= 2) == (name in rounded)
    for state in (model.state_dict(), dict(_exact(model, frozen))):
        assert all(torch.equal(state[name], value) for name, value in values.items())
    whole = sum(values[name].nbytes for name in rounded)
    assert frozen.device_bytes < 0.6 * whole and frozen.host_bytes == whole
    frozen.close()
    assert find_frozen_weights(model) is None and "forward" not in vars(model.get_submodule("lm_head"))
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert not any({"forward", "_apply"} & vars(module).keys() for module in model.modules())


def _exact(model: nn.Module, frozen: FrozenWeights) -> Any:
    with frozen.exact():
        return list(weights_of(model).items())


def test_exact_weights_compute_with_exact_values() -> None:
    model = wide("mixtral", **MOE)
    expected = model(**make_batch()).loss
    frozen = FrozenWeights(model, find_layers(model), "nf4")
    frozen.freeze(())
    assert model(**make_batch()).loss != expected
    with frozen.exact(), frozen.exact():
        assert model(**make_batch()).loss == expected
    assert model(**make_batch()).loss != expected


@pytest.mark.parametrize("strict", [True, False])
def test_loading_a_state_rounds_it_anew(strict: bool) -> None:
    model, other = wide("mixtral", **MOE), wide("mixtral", **MOE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    frozen = FrozenWeights(model, find_layers(model), "nf4")
    frozen.freeze(training_names(model, 0))
    model.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    reference = naive(other, frozen.names, training_names(model, 0), "nf4")
    torch.testing.assert_close(model(**make_batch()).loss, reference(**make_batch()).loss, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), frozen.names[0]: torch.zeros(3, 3)})
    assert model(**make_batch()).loss.isfinite()


def mapped_model(folder: Path) -> Any:
    make_llama(3, dtype=torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_values_in_a_file_take_no_memory_until_they_train(tmp_path: Path) -> None:
    model = mapped_model(tmp_path)
    before = weights_of(model)
    frozen = FrozenWeights(model, find_layers(model), "int8")
    frozen.freeze(())
    assert frozen.host_bytes == 0 and frozen.mapped == set(frozen.names)
    training = training_names(model, 1)
    frozen.activate(training)
    with torch.no_grad():
        for name in training:
            model.get_parameter(name).add_(1)
    frozen.freeze(())
    assert frozen.mapped == set(frozen.names) - training
    trained = training & set(frozen.names)
    assert 0 < frozen.host_bytes == sum(before[name].nbytes for name in trained)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] + (name in training))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    state = copy.deepcopy(model.state_dict())
    other = FrozenWeights(again, find_layers(again), "int8")
    other.freeze(())
    again.load_state_dict(state)
    assert other.host_bytes == frozen.host_bytes  # what is as in the file stays there
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("happens", ["changes", "vanishes", "is replaced"])
def test_a_file_that_changes_is_refused_by_its_name(happens: str, tmp_path: Path) -> None:
    model = mapped_model(tmp_path)
    frozen = FrozenWeights(model, find_layers(model), "int8")
    frozen.freeze(())
    training = training_names(model, 1)
    frozen.activate(training)
    file = tmp_path / "model.safetensors"
    if happens == "vanishes":
        file.unlink()
    elif happens == "changes":
        with open(file, "r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"\0")
    else:
        (tmp_path / "new").write_bytes(file.read_bytes())
        (tmp_path / "new").replace(file)
    said = "is there no more" if happens == "vanishes" else "has changed"
    with pytest.raises(ConfigError, match=rf"model\.safetensors must stay as it is.* {said}"):
        model.state_dict()
    with pytest.raises(ConfigError, match="must stay as it is"):
        frozen.activate(training_names(model, 0))
    with pytest.raises(ConfigError, match="must stay as it is"), frozen.exact():
        pass
    frozen.freeze(())
    assert frozen.mapped == set(frozen.names) - training  # nothing that has trained is lost
    assert model(**make_batch()).loss.isfinite()


def test_a_module_moves_without_becoming_whole() -> None:
    model = wide(dtype=torch.float32)
    frozen = FrozenWeights(model, find_layers(model), "int8")
    frozen.freeze(())
    order = [name for name, _ in model.named_parameters()]
    loss = model(**make_batch()).loss
    model.to("cpu").cpu()
    assert [name for name, _ in model.named_parameters()] == order
    assert model.get_parameter(frozen.names[0]).untyped_storage().nbytes() == 4
    assert torch.equal(model(**make_batch()).loss, loss)
    with pytest.raises(ConfigError, match="must keep its type"):
        model.half()


def test_says_which_matrices_stay_exact(caplog: Any) -> None:
    model: Any = wide("mixtral", **MOE, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    attention.q_proj.forward = attention.q_proj.forward
    attention.k_proj.weight = attention.v_proj.weight
    frozen = FrozenWeights(model, find_layers(model), "int8")
    assert "put in the place of its own" in frozen.kept["model.layers.0.self_attn.q_proj.weight"]
    assert "several modules share it" in frozen.kept["model.layers.0.self_attn.k_proj.weight"]
    assert "2 matrices of the layers stay exact" in caplog.text


def test_a_weight_that_is_read_past_its_module_is_noticed() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.up(inputs), self.down.weight)

    model = nn.Sequential(Past(), Past())
    frozen = FrozenWeights(model, find_layers(model, ["0", "1"]), "int8")
    frozen.freeze(())
    with pytest.raises(ConfigError, match="0.down, 1.down didn't run"):
        model(torch.ones(2, 32))


def test_a_model_without_matrices_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.LayerNorm(32))
    with pytest.raises(ConfigError, match="needs layers with matrices"):
        FrozenWeights(model, find_layers(model, ["0", "1"]), "int8")
    llama = make_llama()
    FrozenWeights(llama, find_layers(llama), "int8")
    with pytest.raises(ConfigError, match="in one already"):
        FrozenWeights(llama, find_layers(llama), "nf4")
