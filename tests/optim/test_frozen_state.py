from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layersample.optim.frozen_state import create_policy
from layersample.optim.memory_use import measure_memory


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_drop_frees_the_tensors(trained: Any) -> None:
    model, optimizer = trained
    before = measure_memory(model, optimizer).optimizer_state
    create_policy("drop").freeze(optimizer, model[0].parameters())
    assert set(optimizer.state) == set(model[1].parameters())
    assert measure_memory(model, optimizer).optimizer_state == before // 2


@pytest.mark.parametrize("name", ["keep", "offload"])
def test_keep_and_offload_lose_nothing(trained: Any, name: Any) -> None:
    model, optimizer = trained
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    policy = create_policy(name)
    policy.freeze(optimizer, model[0].parameters())
    policy.activate(optimizer, model[0].parameters())
    for parameter, state in before.items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_policies_make_no_entries_for_parameters_without_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for name in ("drop", "keep", "offload"):
        policy = create_policy(name)
        policy.freeze(optimizer, model.parameters())
        policy.activate(optimizer, model.parameters())
    assert len(optimizer.state) == 0


def test_offload_moves_tensors_between_devices_but_not_step_counters() -> None:
    """Without a GPU the meta device stands for it: it shows where each tensor goes."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    step = torch.tensor(7.0)
    optimizer.state[parameter] = {"step": step, "exp_avg": torch.zeros(3)}
    policy = create_policy("offload")
    policy.activate(optimizer, [parameter])
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"
    assert optimizer.state[parameter]["step"] is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offload_on_cuda_pins_and_comes_back() -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64, device="cuda")).sum().backward()
    optimizer.step()
    before = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    policy = create_policy("offload")
    policy.freeze(optimizer, model.parameters())
    assert all(s["exp_avg"].is_pinned() for s in optimizer.state.values())
    assert measure_memory(model, optimizer).offloaded_state == 2 * 4 * (64 * 64 + 64)
    policy.activate(optimizer, model.parameters())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in before.items())
