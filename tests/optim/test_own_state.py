"""State from before a scheduler, from an optimizer's constructor, and what is left once the scheduler is closed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from layersample import LayerScheduler
from layersample.optim.own_state import fits
from tests.helpers import make_batch, make_llama

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor-transformers": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, maximize=True),
}
GALORE: dict[str, Any] = {"projection": "galore", "projection_options": {"rank": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masters": {"dtype": torch.bfloat16},
    "galore": GALORE,
    "both": {"dtype": torch.bfloat16, **GALORE},
}


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    model(**make_batch(number)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_from_before_and_a_plain_optimizer_after(name: str, kind: str, state: Any) -> None:
    """A warm-up at full rank, some periods, and steps without the scheduler: none fails, and none is lost."""
    options = dict(KINDS[kind])
    model = make_llama(dtype=options.pop("dtype", torch.float32))
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 0)
    scheduler = LayerScheduler(
        model, optimizer, "cyclic", num_active=2, period=2, state=state, check=True, **options
    )
    for number in range(1, 6):
        step(model, optimizer, number)
        scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    exact = {key: value.clone() for key, value in scheduler.fp32_state_dict().items()}
    scheduler.close()
    assert all(torch.equal(exact[key], value) for key, value in scheduler.fp32_state_dict().items())
    assert_plain(optimizer)
    step(model, optimizer, 6)
    optimizer.load_state_dict(saved)
    assert_plain(optimizer)
    step(model, optimizer, 7)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with LayerScheduler(model, optimizer, "cyclic", num_active=2, period=2, state=state, **options):
        step(model, optimizer, 8)


def assert_plain(optimizer: Optimizer) -> None:
    optimizer.state_dict()  # it is made plain before it is used
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) <= parameters
    for parameter, state in optimizer.state.items():
        assert state and not any(key.startswith("layersample") for key in state)
        assert fits(state, parameter.shape)
        assert all(v.dtype == parameter.dtype for v in state.values() if torch.is_tensor(v) and v.dim() > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_at_full_rank_goes_on_after_closing(dtype: torch.dtype) -> None:
    model = make_llama(dtype=dtype)
    optimizer = OPTIMIZERS["sgd-momentum"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, "cyclic", num_active=2, period=9)
    step(model, optimizer, 0)
    weight = model.model.layers[0].mlp.up_proj.weight
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    scheduler.close()
    optimizer.state_dict()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum.to(dtype))


@pytest.mark.parametrize("kind", ["plain", "masters"])
def test_adagrad_is_a_loop_that_makes_its_sums_by_itself(kind: str) -> None:
    """Its state is made in its constructor, and dropped with a layer: what comes back begins with fresh sums."""
    model = make_llama(dtype=KINDS[kind].get("dtype", torch.float32))
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    exact = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    naive = {name: OPTIMIZERS["adagrad"]([p]) for name, p in exact.items()}
    with LayerScheduler(
        model, optimizer, "cyclic", num_active=2, period=2, sampler_options={"order": "ascending"}
    ) as s:
        for number in range(6):
            model(**make_batch(number)).loss.backward()
            for name, p in model.named_parameters():
                exact[name].grad = None if p.grad is None else p.grad.float()
                if p.grad is None:
                    naive[name] = OPTIMIZERS["adagrad"]([exact[name]])
                naive[name].step()
            optimizer.step()
            s.step()
            optimizer.zero_grad()
        for name, value in s.fp32_state_dict().items():
            torch.testing.assert_close(value, exact[name].detach(), rtol=0, atol=1e-7)


def test_a_state_that_fits_neither_shape_is_not_judged() -> None:
    """Shampoo's preconditioners (m, m) and (n, n), and blocks of 8-bit optimizers."""
    shampoo = {"momentum_buffer": torch.zeros(4, 6), "precond_0": torch.zeros(4, 4)}
    assert not fits(shampoo, (4, 6)) and not fits(shampoo, (12, 6))
    assert fits({"state1": torch.zeros(4, 6), "absmax1": torch.zeros(3), "step": 1}, (4, 6))
    assert not fits({"exp_avg_sq_row": torch.zeros(6), "exp_avg_sq_col": torch.zeros(6)}, (4, 6))


def test_checkpoints_of_an_older_version_are_read() -> None:
    """Its keys had other names; an optimizer's own that look like them are left alone."""
    for kind in ("masters", "galore", "both"):
        options = dict(KINDS[kind])
        dtype = options.pop("dtype", torch.float32)

        def build(
            dtype: torch.dtype = dtype, options: Any = options
        ) -> tuple[Any, Optimizer, LayerScheduler]:
            model = make_llama(dtype=dtype)
            optimizer = OPTIMIZERS["adamw"](model.parameters())
            return (
                model,
                optimizer,
                LayerScheduler(model, optimizer, "cyclic", num_active=2, period=2, **options),
            )

        model, optimizer, scheduler = build()
        for number in range(3):
            step(model, optimizer, number)
            scheduler.step()
        saved = copy.deepcopy(optimizer.state_dict())
        old = {
            "layersample_master": "master_weight",
            "layersample_remainder": "master_remainder",
            "layersample_exceptions": "master_exceptions",
            "layersample_exception_values": "master_exception_values",
        }

        def older(key: str, old: dict[str, str] = old) -> str:
            return old.get(key, key.replace("layersample_projection_", "projection_"))

        renamed = 0
        for states in (saved["state"], saved["state"].get("layersample", {})):
            for number in [key for key in states if isinstance(key, int)]:
                renamed += sum(older(key) != key for key in states[number])
                states[number] = {older(key): value for key, value in states[number].items()}
        assert renamed
        again, other, resumed = build()
        again.load_state_dict(model.state_dict())
        other.load_state_dict(saved)
        resumed.load_state_dict(scheduler.state_dict())
        for m, o, s in ((model, optimizer, scheduler), (again, other, resumed)):
            for number in range(3, 6):
                step(m, o, number)
                s.step()
        one, two = scheduler.fp32_state_dict(), resumed.fp32_state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_keys_of_the_optimizer_that_look_like_ours_stay_its_own() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        count = self.state[p].setdefault("master_count", torch.zeros(()))
                        self.state[p].setdefault("projection_size", p.numel())
                        count += 1
            return super().step(closure)

    model = make_llama(dtype=torch.bfloat16)
    optimizer = Own(model.parameters(), lr=1e-3)
    with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=2, **GALORE) as scheduler:
        for number in range(3):
            step(model, optimizer, number)
            scheduler.step()
        assert int(optimizer.state[model.lm_head.weight]["master_count"]) == 3
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert not any("master_count" in optimizer.state.get(p, {}) for p in frozen)
