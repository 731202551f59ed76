"""Schedulers that are closed, that nothing refers to, that a cell makes again; models and optimizers that change."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from layersample import ConfigError, LayerScheduler, StepInBackward
from tests.helpers import Given, make_batch, make_llama, weights_of


def build(dtype: torch.dtype = torch.float32) -> tuple[Any, torch.optim.Optimizer]:
    model = make_llama(dtype=dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    model(**make_batch(number)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIONS: dict[str, Any] = {
    "projection": "galore",
    "projection_options": {"rank": 4},
    "step_in_backward": StepInBackward(),
    "check": True,
}


def test_a_scheduler_that_nothing_refers_to_lets_go() -> None:
    model, optimizer = build()
    scheduler = LayerScheduler(model, optimizer, Given((1,)), **OPTIONS)
    step(model, optimizer)
    gone = weakref.ref(scheduler)
    del scheduler
    assert gone() is None  # by itself, without the collector of circles
    assert all(p.requires_grad for p in model.parameters())
    before = weights_of(model)
    step(model, optimizer)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    LayerScheduler(model, optimizer, Given((2,))).close()


def test_one_in_a_circle_that_nothing_else_refers_to_lets_go_when_another_is_made() -> None:
    model, optimizer = build()
    gc.disable()
    try:
        circle: list[Any] = [LayerScheduler(model, optimizer, Given((1,)))]
        circle.append(circle)
        del circle
        scheduler = LayerScheduler(model, optimizer, Given((2,)))
    finally:
        gc.enable()
    assert scheduler.active == (2,)
    scheduler.close()


def test_a_scheduler_that_was_closed_does_nothing_when_it_goes() -> None:
    model, optimizer = build()
    first = LayerScheduler(model, optimizer, Given((1,)))
    first.close()
    second = LayerScheduler(model, optimizer, Given((2,)))
    del first
    gc.collect()
    assert [p.requires_grad for p in model.model.layers[1].parameters()] == [False] * 9
    second.close()


def test_a_model_and_its_optimizer_are_freed_with_their_scheduler() -> None:
    model, optimizer = build()
    scheduler = LayerScheduler(model, optimizer, Given((1,)))
    step(model, optimizer)
    gone = weakref.ref(model)
    del model, optimizer, scheduler
    gc.collect()
    assert gone() is None


def test_a_cell_that_is_run_again_replaces_its_scheduler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    model, optimizer = build()
    first = scheduler = LayerScheduler(model, optimizer, Given((1,)), **OPTIONS)
    step(model, optimizer)
    scheduler.step()
    scheduler = LayerScheduler(model, optimizer, Given((2,)), **OPTIONS)
    assert "the new one takes its place" in caplog.text
    before = weights_of(model)
    step(model, optimizer)
    scheduler.step()
    moved = {
        n.split(".")[2]
        for n, p in model.named_parameters()
        if ".layers." in n and not torch.equal(before[n], p)
    }
    assert moved == {"2"}
    with pytest.raises(ConfigError, match="this one is closed"):
        first.step()
    scheduler.close()


def test_a_closed_scheduler_steps_no_more() -> None:
    model, optimizer = build()
    with LayerScheduler(model, optimizer, Given((1,)), period=1) as scheduler:
        step(model, optimizer)
        scheduler.step()
    with pytest.raises(ConfigError, match="this one is closed"):
        scheduler.step()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backward", [None, StepInBackward()])
def test_a_parameter_that_comes_later_trains_and_is_named(
    backward: StepInBackward | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = build(torch.bfloat16)
    scheduler = LayerScheduler(model, optimizer, Given((1,), (2,)), period=1, step_in_backward=backward)
    step(model, optimizer)
    model.lm_head.bias = nn.Parameter(torch.zeros(260, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [model.lm_head.bias], "lr": 0.1})
    for number in range(2):
        scheduler.step()
        step(model, optimizer, number)
    assert caplog.text.count("lm_head.bias came into the model") == 1
    assert model.lm_head.bias.requires_grad and bool(model.lm_head.bias.any())
    scheduler.close()


@pytest.mark.parametrize("how", ["assign", "module"])
def test_parameters_that_were_replaced_are_refused_at_the_next_switch(how: str) -> None:
    model, optimizer = build()
    scheduler = LayerScheduler(model, optimizer, Given((1,), (3,)), period=1)
    step(model, optimizer)
    if how == "assign":
        model.load_state_dict(
            {name: value.clone() for name, value in model.state_dict().items()}, assign=True
        )
    else:
        model.model.norm = type(model.model.norm)(model.config.hidden_size)
    with pytest.raises(ConfigError, match=r"model\..*weight.* isn't the one that it holds any more"):
        scheduler.step()
    scheduler.close(check=False)


def test_parameters_that_were_taken_out() -> None:
    model, optimizer = build()
    scheduler = LayerScheduler(model, optimizer, Given((1,), (3,)), period=1, check=True)
    step(model, optimizer)
    del model.model.layers[3]
    with pytest.raises(ConfigError, match=r"model.layers.3.* isn't there any more"):
        scheduler.step()
    scheduler.close(check=False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_sparse_embedding_may_step_in_backward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 4, sparse=True)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.embed(tokens)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden.square().mean()

    def run(
        backward: StepInBackward | None, dtype: torch.dtype, clip: float | None
    ) -> dict[str, torch.Tensor]:
        model = Model().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with LayerScheduler(
            model, optimizer, Given((0,), (1,), (2,)), period=1, layers="layers", step_in_backward=backward
        ) as scheduler:
            for number in range(4):
                model(torch.tensor([[1, 2, 1, number]])).backward()
                for p in model.parameters() if clip and backward is None else ():
                    if p.grad is not None:
                        norm = (p.grad.coalesce().values() if p.grad.is_sparse else p.grad).float().norm()
                        p.grad = p.grad * (clip / (norm + 1e-6)).clamp(max=1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}

    for dtype in (torch.float32, torch.bfloat16):
        ours, naive = run(StepInBackward(), dtype, None), run(None, dtype, None)
        assert all(torch.allclose(ours[name], naive[name], atol=1e-6) for name in naive)
    options = StepInBackward(max_norm=0.01, clip_by="parameter")
    ours, naive = run(options, torch.float32, 0.01), run(None, torch.float32, 0.01)
    assert all(torch.allclose(ours[name], naive[name], atol=1e-6) for name in naive)


@pytest.mark.parametrize(
    ("unfreezes", "message"),
    [(True, "model.layers.3.* trains until then"), (False, "model.layers.1.* doesn't train until then")],
)
def test_flags_that_somebody_else_changes_are_named(
    unfreezes: bool, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = build()
    with LayerScheduler(model, optimizer, Given((1,), (2,)), period=2) as scheduler:
        for number in range(4):
            model.model.layers[3 if unfreezes else 1].requires_grad_(unfreezes)
            step(model, optimizer, number)
            scheduler.step()
        assert not any(p.requires_grad for p in model.model.layers[3].parameters())
    told = [r.getMessage() for r in caplog.records if "changed from outside" in r.getMessage()]
    assert len(told) == 1 and re.search(message, told[0])


@pytest.mark.parametrize("other", ["train", "freeze"])
def test_a_weight_that_layers_share_is_named(other: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    optimizer = torch.optim.SGD(model.parameters())
    LayerScheduler(model, optimizer, "lisa", other=other).close()
    how = "trains in every period" if other == "train" else "stays frozen"
    assert (
        "model.layers.0.mlp.down_proj.weight is shared by several layers" in caplog.text
        and how in caplog.text
    )


def test_weights_that_change_their_type_are_refused() -> None:
    model, optimizer = build(torch.bfloat16)
    with LayerScheduler(model, optimizer, Given((1,), (2,)), period=2) as scheduler:
        step(model, optimizer)
        scheduler.step()
        model.float()
        step(model, optimizer)
        with pytest.raises(
            ConfigError, match="must keep their type .* was torch.bfloat16 and is torch.float32 now"
        ):
            scheduler.step()
