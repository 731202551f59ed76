from __future__ import annotations

import torch
from torch import nn

from layersample_benchmarks.side_by_side.live_bytes import LiveBytes, replay


def test_a_step_of_two_linear_layers_to_the_byte() -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 32, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 64)
    with torch.no_grad():
        model(x)
    live = LiveBytes(model).start([])
    loss = model(x).sum()
    loss.backward()
    del loss
    optimizer.step()
    peak = live.stop([])
    weights = 4 * (64 * 128 + 128 * 32)
    assert peak.largest["weights"] == weights == peak.at_peak["weights"]
    assert peak.largest["gradients"] == weights
    assert peak.largest["optimizer_state"] == 0
    # Of the rest most is alive in the backward pass of the ReLU: its output, the gradient that it gets and the
    # one that it gives, 16 x 128 each; and the loss and its gradient, a number each.
    assert peak.largest["activations"] == 4 * (3 * 16 * 128 + 2)
    assert peak.total == sum(peak.at_peak.values())


def test_what_an_operation_makes_is_alive_until_it_is_dropped() -> None:
    live = LiveBytes(nn.Linear(1, 1, bias=False)).start([])
    a = torch.zeros(100)
    b = a.view(10, 10)  # the same storage
    del a
    c = torch.zeros(50)
    del b
    d = torch.zeros(60)
    peak = live.stop([])
    assert peak.largest["activations"] == 4 * 150
    assert peak.total == 4 * 150 + 4
    del c, d


def test_adamw_state_is_known_from_its_first_step() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def tensors() -> list[torch.Tensor]:
        return [v for s in optimizer.state.values() for v in s.values()]

    live = LiveBytes(model).start(tensors())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    peak = live.stop(tensors())
    assert peak.largest["optimizer_state"] == 2 * 4 * (32 + 4) + 2 * 4  # two moments and a step counter each
    assert peak.largest["gradients"] == 4 * (32 + 4)


def test_gradients_that_are_freed_in_the_step_are_counted() -> None:
    model = nn.Linear(8, 4, bias=False)
    model(torch.randn(2, 8)).sum().backward()
    live = LiveBytes(model).start([])
    model.weight.grad = None
    x = torch.zeros(1)
    peak = live.stop([])
    assert peak.largest["gradients"] == 128 and peak.total == 256
    del x


def test_replay_by_hand() -> None:
    events = [(0, 10), (1, 5), (1, -5), (3, 7), (0, -10), (5, 4)]
    peak = replay(events, {0: "weights", 3: "gradients"})
    assert peak.total == 17
    assert peak.at_peak == {"weights": 10, "gradients": 7, "optimizer_state": 0, "activations": 0}
    assert peak.largest == {"weights": 10, "gradients": 7, "optimizer_state": 0, "activations": 5}


def test_following_does_not_change_the_numbers() -> None:
    def step(follow: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        live = LiveBytes(model).start([]) if follow else None
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        if live is not None:
            live.stop([])
        return next(model.parameters()).detach().clone()

    assert torch.equal(step(True), step(False))
