"""Settings that bitsandbytes keeps by a parameter's id and place are those of the parameter, whatever stands in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from layersample import LayerScheduler, StepInBackward
from tests.helpers import make_batch, make_llama

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def manager() -> Iterator[Any]:
    """bitsandbytes' one manager, as it was before."""
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def bits(optimizer: Any, model: nn.Module, active: str) -> dict[str, torch.dtype]:
    state = {name: optimizer.state.get(p, {}).get("state1") for name, p in model.named_parameters()}
    return {
        name: value.dtype
        for name, value in state.items()
        if value is not None and (active in name or "lm" in name)
    }


@pytest.mark.parametrize("backward", [None, StepInBackward()], ids=["after", "in-backward"])
@pytest.mark.parametrize("projection", [None, "galore"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["module", "place"])
def test_parameters_keep_settings_of_their_own(
    by: str, dtype: torch.dtype, projection: str | None, backward: StepInBackward | None, manager: Any
) -> None:
    """8 bits for all but one matrix and the head, as the Trainer asks for of embeddings."""
    model = make_llama(dtype=dtype)
    chosen = "model.layers.1.mlp.gate_proj"
    if by == "module":
        for name in (chosen, "lm_head"):
            manager.register_module_override(model.get_submodule(name), "weight", {"optim_bits": 32})
    else:
        wide = [model.get_submodule(name).weight for name in (chosen, "lm_head")]
        manager.override_config(wide, "optim_bits", 32)
        manager.register_parameters(model.parameters())
        manager.pid2config.clear()  # what is left goes by place alone
    optimizer = bnb.optim.AdamW(model.parameters(), lr=1e-3, optim_bits=8, min_8bit_size=1)
    options: dict[str, Any] = {
        "projection": projection,
        "projection_options": {"rank": 4} if projection else None,
    }
    if by == "place" and projection:
        pytest.skip("a projected matrix is in a group of its own, where it has the optimizer's settings")
    with LayerScheduler(
        model, optimizer, "cyclic", num_active=1, period=2, sampler_options={"order": "ascending"},
        state="keep", step_in_backward=backward, **options,
    ) as scheduler:  # fmt: skip
        for step in range(4):
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found = bits(optimizer, model, ".layers.1.")
        assert found and {name for name, kind in found.items() if kind == torch.float32} == {
            f"{chosen}.weight",
            "lm_head.weight",
        }
    own = {id(parameter) for parameter in model.parameters()}
    assert set(manager.pid2config) <= own  # ids of stand-ins may be anyone's next
