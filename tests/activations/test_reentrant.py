from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layersample import ConfigError, LayerScheduler
from tests.helpers import Given

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Elsewhere(torch.autograd.Function):
    """A reentrant checkpoint of someone else's, as fairscale has one."""

    @staticmethod
    def forward(context: Any, run: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        context.run = run
        context.save_for_backward(hidden)
        with torch.no_grad():
            return run(hidden)  # type: ignore[no-any-return]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        hidden = context.saved_tensors[0].detach().requires_grad_(True)
        with torch.enable_grad():
            context.run(hidden).backward(gradient)
        return None, hidden.grad


def by_a_global(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    number = id(block)
    BY_NUMBER[number] = block
    return checkpoint(lambda x: BY_NUMBER[number](x), hidden, use_reentrant=True)  # type: ignore[no-any-return]


BY_NUMBER: dict[int, nn.Module] = {}
WAYS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "another library": lambda block, hidden: Elsewhere.apply(block, hidden),  # type: ignore[no-untyped-call]
    "a global variable": by_a_global,
}


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self._way = WAYS.get(way)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.emb(x)
        for block in self.blocks:
            hidden = block(hidden) if self._way is None else self._way(block, hidden)
        loss: torch.Tensor = self.head(hidden).logsumexp(-1).mean()
        return loss


def scheduled(model: nn.Module, active: int, embeddings: Any = "freeze") -> LayerScheduler:
    optimizer = torch.optim.SGD(model.parameters())
    return LayerScheduler(
        model, optimizer, Given((active,)), num_active=1, layers="blocks", embeddings=embeddings
    )


TOKENS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("active", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_would_be_lost_is_refused_by_name(way: str, active: int) -> None:
    model = Net(way).train()
    with (
        scheduled(model, active),
        pytest.raises(ConfigError, match=f"blocks.{active} runs inside of reentrant"),
    ):
        model(TOKENS)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_comes_is_let_through(way: str) -> None:
    gradients = []
    for each in ("", way):
        model = Net(each).train()
        with scheduled(model, 1, "train"):
            model(TOKENS).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_without_gradients_is_no_one_s_concern(way: str) -> None:
    model = Net(way).train()
    with scheduled(model, 1):
        with torch.no_grad():
            model(TOKENS)
        model.eval()
        model(TOKENS)


def test_it_is_looked_for_once_a_period() -> None:
    model = Net("").train()
    with scheduled(model, 1) as scheduler:
        assert model.blocks[1]._forward_pre_hooks
        with torch.no_grad():
            model(TOKENS)
        assert model.blocks[1]._forward_pre_hooks
        model(TOKENS)
        assert not model.blocks[1]._forward_pre_hooks
        scheduler.advance_to(scheduler.period)
        assert model.blocks[1]._forward_pre_hooks
