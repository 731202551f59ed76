"""A large master is stepped slice by slice in the backward pass: the same to the bit, and less in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layersample import LayerScheduler
from layersample.optim import slices
from layersample.planning.live_memory import LiveMemory
from tests.helpers import Given, causal_lm, make_batch, make_llama

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


def run(make: Any, sets: tuple[tuple[int, ...], ...], **options: Any) -> tuple[Any, ...]:
    """Weights in fp32 and the optimizer's state after two steps with each set."""
    model = make_llama(2, dtype=torch.bfloat16)
    optimizer = make(model.parameters())
    scheduler = LayerScheduler(
        model, optimizer, Given(*sets), period=2, step_in_backward=True, check=True, **options
    )
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for number in range(2 * len(sets)):
        model(**make_batch(number)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return scheduler.fp32_state_dict(), optimizer.state_dict()["state"], len(steps)


def same(state: Any, other: Any) -> bool:
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(same(state[key], other[key]) for key in state)
    if isinstance(state, torch.Tensor):
        return state.shape == other.shape and state.stride() == other.stride() and torch.equal(state, other)
    return bool(state == other)


@pytest.mark.parametrize(
    ("name", "state"), [*((name, "drop") for name in OPTIMIZERS), ("adamw-fused", "keep")]
)
def test_slices_are_stepped_as_the_whole_is(name: str, state: str, monkeypatch: Any) -> None:
    expected = run(OPTIMIZERS[name], ((0,), (1,), (0,)), state=state)
    monkeypatch.setattr(slices, "LARGEST", 1024)  # the embedding, (260, 16), in five slices
    found = run(OPTIMIZERS[name], ((0,), (1,), (0,)), state=state)
    assert found[2] > expected[2]
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Adafactor(p, lr=1e-2), lambda p: torch.optim.Adagrad(p, lr=1e-2)]
)
def test_what_may_look_at_a_whole_matrix_is_stepped_at_once(make: Any, monkeypatch: Any) -> None:
    expected = run(make, ((0,),))
    monkeypatch.setattr(slices, "LARGEST", 1024)
    found = run(make, ((0,),))
    assert found[2] == expected[2] and same(found[0], expected[0])


def test_a_projected_weight_is_stepped_at_once(monkeypatch: Any) -> None:
    options = {"projection": "galore", "projection_options": {"rank": 4, "update_gap": 2}}
    expected = run(OPTIMIZERS["adamw"], ((0,), (1,)), **options)
    monkeypatch.setattr(slices, "LARGEST", 1024)
    found = run(OPTIMIZERS["adamw"], ((0,), (1,)), **options)
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), 1),
        ((5,), 1),
        ((64, 100), 1),  # fewer rows than a slice has at least
        ((1024, 1024), 16),
        ((1000, 1024), 16),
        ((70000, 1), 2),
        ((4, 1024, 64), 1),
    ],
)
def test_slices_hold_every_row_once(shape: tuple[int, ...], expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(slices, "LARGEST", 2**16)
    parameter = nn.Parameter(torch.zeros(shape))
    found = slices.find_slices(torch.optim.AdamW([parameter]), parameter)
    assert len(found) == expected
    assert found[0].start == 0 and found[-1].stop == (shape[0] if shape else 1)
    assert all(one.stop == after.start for one, after in zip(found, found[1:], strict=False))
    assert all((one.stop - one.start) % 64 == 0 for one in found[:-1])


def test_the_gradient_is_never_whole_in_fp32(monkeypatch: Any) -> None:
    def temporary() -> int:
        model: Any = causal_lm("llama", vocab_size=4096).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens, embedding = make_batch()["input_ids"], model.get_input_embeddings()
        with LayerScheduler(model, optimizer, Given((0,)), step_in_backward=True, head="freeze"):
            embedding(tokens).sum().backward()  # state is made
            optimizer.step()
            held = [value for state in optimizer.state.values() for value in state.values()]
            live = LiveMemory(vocabulary=None)
            live.label([*model.parameters(), *model.buffers(), *held], "weights")
            loss = embedding(tokens).sum()
            with live, live.moment("backward"):
                loss.backward()
        return sum(size for kind, size in live.moments["backward"].items() if kind != "weights")

    whole = temporary()
    monkeypatch.setattr(slices, "LARGEST", 4096)
    assert temporary() < whole - 0.9 * 4 * 4096 * 16  # its bytes in fp32
