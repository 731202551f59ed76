"""torch's reentrant checkpointing gives an active layer its gradients, wherever in a model it stands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

from layersample import ConfigError, LayerScheduler
from layersample.activations.reentrant_gradients import ReentrantGradients
from layersample.versions import checkpoint_activations
from tests.helpers import Given, make_batch, make_llama

# torch says so of what is frozen below the lowest active layer, and of a checkpoint inside of another.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
TOKENS = torch.arange(12).reshape(2, 6)


class Block(nn.Module):
    """A layer with parameters of its own, a random part, and a part that may be checkpointed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), nn.Dropout(0.3)
        self.runs = 0

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        dropped: torch.Tensor = self.dropout(hidden)
        return dropped * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.part(hidden))
        return result


Run = Callable[..., torch.Tensor]  # torch's checkpoint, reentrant or not
Way = Callable[[Run, "Net", torch.Tensor], torch.Tensor]


def each(run: Callable[[Run, Block, torch.Tensor], torch.Tensor]) -> Way:
    """A checkpoint around each block."""

    def forward(run_checkpoint: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
        for block in net.each_block():
            hidden = run(run_checkpoint, block, hidden)
        return hidden

    return forward


def by_default(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return run(lambda x, b=block, *, c=None: b(x), hidden)


def by_keyword(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return run(functools.partial(block, hidden=hidden))


def before_its_time(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    def twice(x: torch.Tensor, again: bool = False) -> torch.Tensor:
        result: torch.Tensor = later(x) if again else block(x)
        return result

    result = run(twice, hidden)
    later = block
    return result


def weight_alone(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    weight = block.linear.weight
    return run(lambda x: nn.functional.linear(x, weight), block.part(hidden))


def twice(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return run(functools.partial(run, block), hidden)


def pair(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return run(lambda x: (x.argmax(-1), block(x)), hidden)[1]


def by_a_partial_of_its_own(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    class Doubled(functools.partial[torch.Tensor]):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().__call__(*args, **kwargs) * 2

    return run(Doubled(block), hidden)


def with_a_mask(run: Run, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """What requires no gradient may be written to again before backward, as torch lets it be."""
    mask = torch.ones(8)
    result = run(functools.partial(lambda x, mask: block(x) * mask, mask=mask), hidden)
    mask.mul_(1)
    return result


def complex_numbers(run: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
    for index in range(len(net.blocks)):
        hidden = run(lambda x, index=index: torch.complex(net.blocks[index](x), x), hidden).real
    return hidden


def of_the_net(run: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
    for index in range(len(net.blocks)):
        hidden = run(lambda x, index=index: net.blocks[index](x), hidden)
    return hidden


def in_a_row(run: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
    return run(lambda x: net.blocks[2](net.blocks[1](x)), run(net.blocks[0], hidden))


def all_of_it(run: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
    """No floating input at all."""
    return run(net.embed_and_run, TOKENS)


def sequential(run: Run, net: Net, hidden: torch.Tensor) -> torch.Tensor:
    keywords = getattr(run, "keywords", {})
    return checkpoint_sequential([*net.blocks], 2, hidden, **keywords)  # type: ignore[no-any-return, no-untyped-call]


# A checkpoint that holds one block alone, so that what is frozen below isn't run again.
ONE_BLOCK: dict[str, Way] = {
    "a layer": each(lambda run, block, hidden: run(block, hidden)),
    "a closure over it": each(lambda run, block, hidden: run(lambda x: block(x), hidden)),
    "a default": each(by_default),
    "a bound method": each(lambda run, block, hidden: run(block.forward, hidden)),
    "a part": each(lambda run, block, hidden: block.linear(run(block.part, hidden))),
    "a weight": each(weight_alone),
    "an argument": each(lambda run, block, hidden: run(lambda b, x: b(x), block, hidden)),
    "a partial": each(lambda run, block, hidden: run(functools.partial(block, hidden))),
    "by keyword": each(by_keyword),
    "in a closure": each(lambda run, block, hidden: run(lambda: block(hidden))),
    "in a list": each(
        lambda run, block, hidden: run(lambda x, own={"all": [(block,)]}: own["all"][0][0](x), hidden)
    ),
    "a variable that isn't set yet": each(before_its_time),
    "two outputs": each(pair),
    "one in another": each(twice),
    "a partial of its own": each(by_a_partial_of_its_own),
    "a mask": each(with_a_mask),
}
WAYS: dict[str, Way] = {
    **ONE_BLOCK,
    "a closure over the model": of_the_net,
    "complex numbers": complex_numbers,
    "two layers": in_a_row,
    "the whole model": all_of_it,
    "checkpoint_sequential": sequential,
}


class Net(nn.Module):
    def __init__(self, way: str | Way, reentrant: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self._way = WAYS[way] if isinstance(way, str) else way
        self._run = functools.partial(checkpoint, use_reentrant=reentrant)

    def each_block(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed_and_run(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.emb(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self._way(self._run, self, self.emb(x))).logsumexp(-1).mean()
        return loss


def scheduled(model: nn.Module, active: int, embeddings: Any = "freeze") -> LayerScheduler:
    optimizer = torch.optim.SGD(model.parameters())
    return LayerScheduler(
        model, optimizer, Given((active,)), num_active=1, layers="blocks", embeddings=embeddings
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of dropout
    model(TOKENS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("embeddings", ["freeze", "train"])
@pytest.mark.parametrize("active", [0, 1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without_reentrant(way: str, active: int, embeddings: str) -> None:
    found = []
    for reentrant in (False, True):
        model = Net(way, reentrant).train()
        with scheduled(model, active, embeddings):
            found.append(gradients(model))
    assert any(name.startswith(f"blocks.{active}.") for name in found[0])
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("way", ONE_BLOCK)
def test_what_is_frozen_below_is_not_run_again(way: str) -> None:
    model = Net(way).train()
    with scheduled(model, 1):
        model(TOKENS)
        once = [block.runs for block in model.each_block()]
        gradients(model)
    runs = [block.runs - 2 * before for block, before in zip(model.each_block(), once, strict=True)]
    assert runs[0] == 0
    assert way == "a weight" or min(runs[1:]) > 0  # its random part stands in front of the checkpoint


@pytest.mark.parametrize("embeddings", ["freeze", "train"])
@pytest.mark.parametrize(
    ("put", "shown"),
    [
        (lambda x: [x], r"returned \[tensor"),
        (lambda x: {"hidden": x}, "returned {'hidden': tensor"),
        (lambda x: ((x, 1), 2), r"returned \(\(tensor"),
    ],
    ids=["list", "dict", "tuple"],
)
def test_outputs_that_torch_does_not_see_are_refused(put: Any, shown: str, embeddings: str) -> None:
    model = Net(each(lambda run, block, hidden: run(lambda x: put(block(x)), hidden))).train()
    with scheduled(model, 0, embeddings), pytest.raises(ConfigError, match=shown):
        model(TOKENS)


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl")  # torch 2.8, at the import of its wrapper
@pytest.mark.parametrize("active", [0, 2])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_wrapper_of_torch_gives_its_gradients(active: int, keyword: bool) -> None:
    def call(run: Run, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block(hidden=hidden) if keyword else block(hidden)
        return result

    found = []
    for kind in (CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT):
        model = Net(
            lambda run, net, hidden: functools.reduce(lambda h, b: call(run, b, h), net.blocks, hidden)
        )
        for index in range(3):
            model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=kind)
        with scheduled(model, active):
            found.append(gradients(model.train()))
    assert_equal(found[1], found[0])


def test_a_layer_of_transformers_that_gets_its_input_by_keyword() -> None:
    found = []
    for reentrant in (False, True):
        model = make_llama().train()
        checkpoint_activations(model, {"use_reentrant": reentrant})
        for layer in model.model.layers:
            layer.__class__ = by_its_keyword(type(layer))
        optimizer = torch.optim.SGD(model.parameters())
        with LayerScheduler(model, optimizer, Given((1,)), num_active=1, embeddings="freeze"):
            model(**make_batch(), use_cache=False).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(found[1], found[0])


def by_its_keyword(kind: Any) -> Any:
    class ByKeyword(kind):  # type: ignore[misc]
        def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return super().__call__(hidden_states=hidden_states, **kwargs)

    return ByKeyword


def test_a_model_without_a_scheduler_is_left_alone() -> None:
    one, other = Net("a layer").train(), Net("a layer").train()
    for parameter in [*other.emb.parameters(), *other.blocks[0].parameters()]:
        parameter.requires_grad_(False)
    expected = gradients(other)
    assert not any(name.startswith("blocks.") for name in expected), "torch gives them by itself"
    other.zero_grad()
    with scheduled(one, 1):
        assert_equal(gradients(other), expected)


def test_torch_s_own_function_is_back_after_the_last_scheduler() -> None:
    first, second = scheduled(Net("a layer"), 0), scheduled(Net("a layer"), 0)
    assert "apply" in vars(CheckpointFunction)
    first.close()
    first.close()
    assert "apply" in vars(CheckpointFunction)
    del second
    assert "apply" not in vars(CheckpointFunction)


def test_what_someone_else_puts_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = staticmethod(lambda *args: args)
    kept = ReentrantGradients(Net("a layer"))
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFunction, "apply", theirs)
        kept.close()
        assert vars(CheckpointFunction)["apply"] is theirs
        with scheduled(Net("a layer"), 0):
            assert vars(CheckpointFunction)["apply"] is theirs
        assert vars(CheckpointFunction)["apply"] is theirs


def test_a_function_that_holds_very_much_is_looked_through_in_part() -> None:
    model = Net(each(lambda run, block, hidden: run(lambda x, much=[*range(10**5)], b=block: b(x), hidden)))
    with scheduled(model.train(), 1):
        assert any(name.startswith("blocks.1.") for name in gradients(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own
@pytest.mark.parametrize("part", ["model", "layers"])
def test_compiled_models_train_alike(part: str) -> None:
    torch.compiler.reset()
    found = []
    for reentrant in (False, True):
        model: Any = Net("a layer", reentrant).train()
        if reentrant:
            for module in [model] if part == "model" else model.blocks[1:]:
                module.compile(backend="eager")
        with scheduled(model, 1):
            found.append(gradients(model))
    torch.compiler.reset()
    assert_equal(found[1], found[0])
