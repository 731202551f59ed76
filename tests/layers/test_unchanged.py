"""A model is what it was after every measurement, and after one that fails at any point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from layersample import ConfigError, LayerScheduler, MeasuredSampler, Measurement
from layersample.layers.unchanged import unchanged
from layersample.metrics import outlier_ratios, probe_lora
from tests.helpers import make_batch, make_llama, make_mixtral

Measure = Callable[[nn.Module, Iterator[Any]], Any]
MEASURES: dict[str, Measure] = {
    "probe_lora": lambda model, batches: probe_lora(model, batches, steps=3, rank=2),
    "outlier_ratios": outlier_ratios,
}


class Planted(Exception):
    """What a test raises in the middle of a measurement."""


def make(kind: str) -> Any:
    """A model with gradients, a part that is frozen and one in another mode, and buffers that move."""
    if kind == "llama":
        model: Any = make_llama(2)
        model.model.norm = nn.Sequential(model.model.norm, _Batches())
    else:
        model = make_mixtral()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


class _Batches(nn.Module):
    """A norm over batches, whose buffers move in each forward pass in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(hidden.transpose(1, 2))
        return normed.transpose(1, 2)


def picture(model: Any) -> dict[str, Any]:
    """All that must be the same again."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (key, list(value))
            for module in model.modules()
            for key, value in vars(module).items()
            if "_hooks" in key and isinstance(value, dict)
        ],
        "parameters": [(name, id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()],
        "values": [p.detach().clone().tolist() for p in model.parameters()],
        "gradients": [p.grad if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "buffers": [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
        "experts": getattr(model.config, "_experts_implementation", None),
        "random": torch.get_rng_state().tolist(),
    }


def raising_batches(after: int) -> Iterator[Any]:
    yield from (make_batch(i) for i in range(after))
    raise Planted


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_leaves_no_trace(name: str, kind: str) -> None:
    model = make(kind)
    before = picture(model)
    MEASURES[name](model, iter([make_batch(0), make_batch(1)]))
    assert picture(model) == before


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "where", ["first batch", "later batch", "first layer", "second forward", "head", "wrapping"]
)
def test_a_measurement_that_fails_leaves_no_trace(
    name: str, kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    batches: Iterator[Any] = iter([make_batch(0), make_batch(1), make_batch(2)])
    calls = iter(range(1000))

    def fail(*args: Any, **kwargs: Any) -> None:
        if where != "second forward" or next(calls) == 1:
            raise Planted

    if where in ("first batch", "later batch"):
        batches = raising_batches(0 if where == "first batch" else 1)
    elif where == "wrapping":  # PEFT, or torch while it gets its hooks, gives up in the middle
        if name == "probe_lora":
            counted = iter(range(3))
            wrap = _peft_layer()._create_and_replace
            monkeypatch.setattr(
                _peft_layer(),
                "_create_and_replace",
                lambda *a, **k: wrap(*a, **k) if next(counted, None) is not None else fail(),
            )
        else:
            counted = iter(range(3))
            register = nn.Module.register_forward_pre_hook
            monkeypatch.setattr(
                nn.Module,
                "register_forward_pre_hook",
                lambda *a, **k: register(*a, **k) if next(counted, None) is not None else fail(),
            )
    else:
        module = model.lm_head if where == "head" else model.model.layers[0]
        monkeypatch.setattr(module, "forward", _first(fail, module.forward))
    before = picture(model)
    with pytest.raises(Planted):
        MEASURES[name](model, batches)
    monkeypatch.undo() if where == "wrapping" else None
    assert picture(model) == before


def _peft_layer() -> Any:
    from peft.tuners.lora import LoraModel

    return LoraModel


def _first(first: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


class Messy(MeasuredSampler):
    """Take a model apart, and fail."""

    def measure(self, measurement: Measurement) -> None:
        model: Any = measurement.model
        model.model.layers[0].mlp = nn.Identity()
        model.model.layers[1].register_forward_hook(lambda *_: None)
        model.requires_grad_(False)
        model.eval()
        model.notes = "here"
        raise Planted("in the middle")


def test_a_sampler_of_ones_own_that_fails_leaves_no_trace_and_is_named() -> None:
    model = make("llama")
    before = picture(model)
    with pytest.raises(
        ConfigError, match="Sampler Messy, period 0: .*test_unchanged.py, line .* Planted: in"
    ):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), Messy(), num_active=1)
    assert picture(model) == before


def test_a_model_that_peft_refuses_halfway() -> None:
    config = transformers.MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config)
    before = picture(model)
    with pytest.raises(ConfigError, match="Sampler lora_norm, period 0: "):
        LayerScheduler(
            model,
            torch.optim.AdamW(model.parameters()),
            "lora_norm",
            num_active=1,
            batches=[make_batch(0)],
        )
    assert picture(model) == before


def test_only_after_errors_leaves_alone_what_ended_well() -> None:
    model = make_llama(2)
    with unchanged(model, only_after_errors=True):
        model.eval()
    assert not model.training
    with pytest.raises(Planted), unchanged(model, only_after_errors=True):
        model.train()
        raise Planted
    assert not model.training
