"""Tensors deep inside of state are moved and counted as those on top."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from layersample.optim.frozen_state import create_policy
from layersample.optim.memory_use import optimizer_tensors
from layersample.optim.nested import map_tensors, opaque_in, tensors_in

Pair = namedtuple("Pair", "left right")


class Projector:
    def __init__(self, matrix: torch.Tensor, parameter: nn.Parameter) -> None:
        self.matrix, self.parameter, self.rank, self.me = matrix, parameter, 4, self


def nested(device: str) -> tuple[nn.Parameter, dict[str, Any]]:
    parameter = nn.Parameter(torch.empty(3, device=device))

    def tensor() -> torch.Tensor:
        return torch.zeros(3, device=device)

    return parameter, {
        "step": torch.tensor(1.0),
        "exp_avg": tensor(),
        "factors": [tensor(), [tensor()], {"deep": tensor()}],
        "pair": Pair(tensor(), (tensor(), None)),
        "projector": Projector(tensor(), parameter),
    }


def test_offload_moves_tensors_at_any_depth() -> None:
    """The meta device stands for a GPU: it shows where each tensor goes."""
    parameter, state = nested("meta")
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter] = nested("cpu")[1]
    optimizer.state[parameter]["projector"].parameter = parameter
    create_policy("offload").activate(optimizer, [parameter])
    moved = optimizer.state[parameter]
    tensors = [t for t in tensors_in(moved) if t.dim() > 0]
    assert len(tensors) == 7 and all(t.device.type == "meta" for t in tensors)
    assert isinstance(moved["pair"], Pair) and moved["projector"].parameter is parameter
    assert moved["step"].device.type == "cpu" and len(optimizer_tensors(optimizer)) == 8


def test_a_value_that_is_the_same_object_stays_so() -> None:
    _, state = nested("cpu")
    factors, projector = state["factors"], state["projector"]
    map_tensors(state, lambda tensor: tensor + 1)
    assert state["factors"] is factors and state["projector"] is projector
    assert all(bool((t == 1).all()) for t in tensors_in(state) if t.dim() > 0)


def test_offload_names_what_it_cannot_look_into(caplog: pytest.LogCaptureFixture) -> None:
    class Slots:
        __slots__ = ("tensor",)

    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter] = {"odd": [Slots()], "fine": {"a": 1, "b": None, "dtype": torch.float32}}
    policy = create_policy("offload")
    for _ in range(2):
        policy.freeze(optimizer, [parameter])
    assert [r.getMessage() for r in caplog.records if "odd" in r.getMessage() and "Slots" in r.getMessage()]
    assert len(caplog.records) == 1
    assert list(opaque_in({"fine": (1, "a", torch.device("cpu"))})) == []
