from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from layersample import ConfigError, LayerScheduler
from layersample.parallel.base import Engine
from layersample.parallel.find import find_engine
from tests.helpers import make_batch, make_llama

# What DeepSpeed's classes look like from outside; the package itself isn't needed.
ZeroOptimizer: Any = type(
    "DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"}
)


class DeepSpeedOptimizerWrapper:
    """By the name of accelerate's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def optimizer_of(model: torch.nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters())


def test_one_process_needs_no_engine() -> None:
    model = make_llama()
    engine = find_engine(model, optimizer_of(model))
    assert type(engine) is Engine and engine.model is model
    engine.prepare()
    assert not model._forward_pre_hooks
    engine.switched(["a"], 0)
    engine.close()


@pytest.mark.parametrize("shown_by", ["model", "optimizer", "accelerate's wrapper", "ZeRO-3's parameters"])
def test_deepspeed_is_refused_without_importing_it(shown_by: str) -> None:
    model: Any = make_llama()
    optimizer: Any = optimizer_of(model)
    if shown_by == "model":
        model.__class__ = type("DeepSpeedEngine", (type(model),), {"__module__": "deepspeed.runtime.engine"})
    elif shown_by == "optimizer":
        optimizer = ZeroOptimizer()
    elif shown_by == "accelerate's wrapper":
        optimizer = DeepSpeedOptimizerWrapper(optimizer)
    else:
        next(model.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="under DeepSpeed: ZeRO.*Use FSDP2"):
        LayerScheduler(model, optimizer, "lisa")


def test_data_parallel_is_refused() -> None:
    model = torch.nn.DataParallel(make_llama())
    with pytest.raises(ConfigError, match="nn.DataParallel.*torchrun, or set CUDA_VISIBLE_DEVICES=0"):
        LayerScheduler(model, optimizer_of(model), "lisa")


def test_a_refused_model_is_left_as_it_was() -> None:
    model = make_llama()
    with pytest.raises(ConfigError):
        LayerScheduler(model, ZeroOptimizer(), "lisa")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(**make_batch()).loss.requires_grad
