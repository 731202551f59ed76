"""Several optimizers of one model, wrappers of one, and those that can't be right and are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample import ConfigError, LayerScheduler, StepInBackward, measure_memory
from tests.helpers import make_batch, make_llama, weights_of


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return matrices, others


def as_groups(model: nn.Module) -> list[Optimizer]:
    """One optimizer whose groups are those of the two below."""
    matrices, others = split_parameters(model)
    groups = [{"params": matrices, "lr": 1e-3}, {"params": others, "lr": 1e-2}]
    return [torch.optim.AdamW(groups, foreach=False)]


def as_list(model: nn.Module) -> list[Optimizer]:
    matrices, others = split_parameters(model)
    return [
        torch.optim.AdamW(matrices, lr=1e-3, foreach=False),
        torch.optim.AdamW(others, lr=1e-2, foreach=False),
    ]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices, others = split_parameters(model)
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-2)]


def run(
    build: Callable[[nn.Module], list[Optimizer]],
    *,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[dict[str, Tensor], list[Optimizer]]:
    def begin() -> tuple[nn.Module, list[Optimizer], LayerScheduler]:
        model = make_llama(dtype=dtype)
        optimizers = build(model)
        given: Any = optimizers if len(optimizers) > 1 else optimizers[0]
        scheduler = LayerScheduler(model, given, "cyclic", num_active=2, period=2, check=True, **options)
        assert scheduler.optimizer is given
        return model, optimizers, scheduler

    model, optimizers, scheduler = begin()
    for step in range(7):
        if step == stop:
            kept = model.state_dict(), [o.state_dict() for o in optimizers], scheduler.state_dict()
            model, optimizers, scheduler = begin()
            model.load_state_dict(kept[0])
            for optimizer, state in zip(optimizers, kept[1], strict=True):
                optimizer.load_state_dict(state)
            scheduler.load_state_dict(kept[2])
        model(**make_batch(step), use_cache=False).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}, optimizers


COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep": {"state": "keep"},
    "offload": {"state": "offload"},
    "masters": {"dtype": torch.bfloat16},
    "galore": {"projection": "galore", "projection_options": {"rank": 4}, "dtype": torch.bfloat16},
    "backward": {"step_in_backward": StepInBackward(max_norm=0.1)},
}


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_two_optimizers_are_one_with_two_groups(options: dict[str, Any]) -> None:
    one, _ = run(as_groups, **options)
    two, optimizers = run(as_list, **options)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(int(state.get("step", 7)) <= 7 for o in optimizers for state in o.state.values())


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_muon_with_adamw_resumes_to_the_bit(options: dict[str, Any]) -> None:
    whole, optimizers = run(muon_and_adamw, **options)
    resumed, _ = run(muon_and_adamw, stop=3, **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    counts = {int(state["step"]) for state in optimizers[1].state.values() if "step" in state}
    assert 7 in counts  # of the embedding, which trains at each step: no moment has been begun anew


def test_dropped_state_is_dropped_of_each() -> None:
    model = make_llama()
    optimizers = muon_and_adamw(model)
    scheduler = LayerScheduler(model, optimizers, "cyclic", num_active=1, period=1)
    for step in range(3):
        model(**make_batch(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
    layer = set(model.model.layers[scheduler.active[0]].parameters())
    assert set(optimizers[0].state) <= layer
    assert measure_memory(model, optimizers).optimizer_state > 0
    scheduler.close()


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = make_llama()
    both: list[Optimizer] = [
        torch.optim.SGD(model.parameters()),
        torch.optim.AdamW(model.lm_head.parameters()),
    ]
    with pytest.raises(ConfigError, match="in one group of one optimizer, but lm_head.weight"):
        LayerScheduler(model, both, "lisa")
    with pytest.raises(ConfigError, match="each once"):
        LayerScheduler(model, [both[0], both[0]], "lisa")
    with pytest.raises(ConfigError, match="at least one"):
        LayerScheduler(model, [], "lisa")
    with pytest.raises(ConfigError, match="there is a Linear"):
        LayerScheduler(model, [nn.Linear(2, 2)], "lisa")  # type: ignore[list-item]


class SAM(Optimizer):
    """As the common implementation: an ascent step, then the inner optimizer's from where it began."""

    def __init__(self, params: Any, inner: type[Optimizer], **options: Any) -> None:
        super().__init__(params, dict(rho=0.05, **options))
        self.base_optimizer = inner(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()


@pytest.mark.parametrize("state", ["drop", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sam_steps_from_where_it_began(state: Any, dtype: torch.dtype) -> None:
    """Against its inner optimizer, given the gradients of the ascended weights."""

    def ascended(model: nn.Module, step: int) -> None:
        model(**make_batch(step)).loss.backward()

    results = []
    for naive in (False, True):
        model = make_llama(dtype=dtype)
        sam = SAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
        given = sam.base_optimizer if naive else sam
        with LayerScheduler(
            model, given, "cyclic", num_active=1, period=2, state=state, check=True
        ) as scheduler:
            for step in range(6):
                ascended(model, step)
                before = {p: p.detach().clone() for p in model.parameters()}
                sam.first_step()
                sam.zero_grad()
                ascended(model, step)
                if naive:
                    with torch.no_grad():
                        for p, value in before.items():
                            p.copy_(value)
                    sam.base_optimizer.step()
                else:
                    sam.second_step()
                scheduler.step()
                sam.zero_grad()
                if not naive and state == "drop":
                    frozen = [p for p in model.parameters() if not p.requires_grad]
                    assert not any(sam.state.get(p) for p in frozen)  # nor of the wrapper
            results.append({n: v.clone() for n, v in scheduler.fp32_state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class Lookahead(Optimizer):
    """Moves all weights, with a gradient or not, to slow ones each third step."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer, self.param_groups, self.count = inner, inner.param_groups, 0
        self.state: Any = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        self.count += 1
        for group in self.param_groups if self.count % 3 == 0 else ():
            for p in group["params"]:
                slow = self.state.setdefault(p, {}).setdefault("slow", p.data.clone())
                p.data.copy_(slow.add_(p.data - slow, alpha=0.5))


def test_a_wrapper_that_moves_frozen_weights_is_refused_before_it_does() -> None:
    model = make_llama()
    wrapper = Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2))
    scheduler = LayerScheduler(model, wrapper, "cyclic", num_active=1, period=2)
    before, refused = weights_of(model), None
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and ".3." in n}
    for step in range(6):
        try:
            model(**make_batch(step)).loss.backward()
            wrapper.step()
        except ConfigError as error:
            refused = str(error)
            break
        scheduler.step()
        model.zero_grad()
    assert refused is not None and "Lookahead keeps state of frozen parameters" in refused
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in frozen)


def test_a_wrapper_with_state_of_everything_is_refused_when_the_scheduler_is_made() -> None:
    model = make_llama()
    wrapper = Lookahead(torch.optim.AdamW(model.parameters()))
    wrapper.state = {p: {"slow": p.detach().clone()} for p in model.parameters()}
    with pytest.raises(
        ConfigError, match="made state of every parameter before its first step.*AdamW inside"
    ):
        LayerScheduler(model, wrapper, "lisa")


class Chain(Optimizer):
    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class Overlapping(Optimizer):
    """Steps all of its parameters itself, and has others step some of them."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = (parts[0], torch.optim.SGD(parts[0].param_groups[0]["params"]), parts[1])


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != "backward"])
def test_a_chain_is_the_list_of_its_members(name: str, caplog: pytest.LogCaptureFixture) -> None:
    options = COMBINATIONS[name]
    listed, _ = run(muon_and_adamw, **options)
    chained, (chain,) = run(lambda model: [Chain(*muon_and_adamw(model))], **options)
    assert all(torch.equal(listed[name], chained[name]) for name in listed)
    assert not chain.state
    assert "Chain leaves the state of the optimizers that it steps (Muon, AdamW)" in caplog.text


class OneVector(Optimizer):
    """Keeps the state of all parameters under a name."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        flat = [p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.state["moment"] = {"flat": torch.cat(flat)}  # type: ignore[index]


class StateOfFrozen(OneVector):
    """Makes state of what has no gradient as well."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = torch.ones(1)


def test_what_cannot_be_right_is_refused_when_the_scheduler_is_made() -> None:
    model = make_llama()
    refused: list[tuple[Any, str]] = [
        (Overlapping(*muon_and_adamw(model)), r"Overlapping has others do it \(Muon, SGD, AdamW\)"),
        (torch.optim.SGD(model.parameters(), lr=1e-3, differentiable=True), "differentiable=False"),
    ]
    named = torch.optim.SGD(model.parameters())
    named.state["shared"] = {"moment": torch.ones(3)}  # type: ignore[index]
    refused.append((named, "SGD keeps state under 'shared'"))
    for optimizer, message in refused:
        with pytest.raises(ConfigError, match=message):
            LayerScheduler(model, optimizer, "lisa")
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "message", "dtype"),
    [
        (OneVector, "keeps state under 'moment'", torch.float32),
        (OneVector, "keeps state under 'moment'", torch.bfloat16),
        (StateOfFrozen, "that are frozen", torch.float32),  # with masters it never sees what is frozen
    ],
)
def test_state_that_is_not_of_parameters_is_refused_at_the_first_step(
    kind: Any, message: str, dtype: torch.dtype
) -> None:
    model = make_llama(dtype=dtype)
    optimizer = kind(model.parameters())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    scheduler = LayerScheduler(model, optimizer, "cyclic", num_active=1)
    model(**make_batch()).loss.backward()
    with pytest.raises(ConfigError, match=message):
        optimizer.step()
    assert all(a is b for a, b in zip(groups[0], optimizer.param_groups[0]["params"], strict=True))
    scheduler.close()


def schedule_free(parameters: Any) -> Any:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)


def test_schedule_free_weights_are_the_same_in_evaluation_whether_state_is_dropped_or_kept() -> None:
    after = {}
    for state in ("drop", "keep"):
        model = make_llama()
        optimizer = schedule_free(model.parameters())
        optimizer.train()
        with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=3, state=state) as scheduler:
            for step in range(3):
                model(**make_batch(step)).loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            assert all(group["train_mode"] for group in optimizer.param_groups)
            optimizer.eval()
            after[state] = weights_of(model)
    assert all(torch.equal(after["drop"][name], value) for name, value in after["keep"].items())


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"state": "offload"}, torch.float32),
        ({"projection": "galore", "projection_options": {"rank": 4}}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_schedule_free_is_refused_where_its_state_would_not_fit_the_weight(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_llama(dtype=dtype)
    with pytest.raises(ConfigError, match=r"has train\(\) and eval\(\)"):
        LayerScheduler(model, schedule_free(model.parameters()), "lisa", **options)
