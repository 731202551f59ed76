from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from layersample import (
    ConfigError,
    LayerScheduler,
    MeasuredSampler,
    Measurement,
    SamplingContext,
    find_layers,
    register,
)
from layersample.optim.step_in_backward import StepInBackward
from layersample.scheduling.self_check import SelfCheckError
from tests.helpers import Given, make_batch, make_llama, weights_of

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
}


def train(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LayerScheduler | None,
    steps: range,
    accumulate: int = 1,
) -> None:
    for step in steps:
        for micro in range(accumulate):
            (model(**make_batch(step * accumulate + micro)).loss / accumulate).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def trained_layers(before: dict[str, torch.Tensor], model: nn.Module) -> set[int]:
    return {int(name.split(".")[2]) for name in changed(before, model) if ".layers." in name}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_only_active_layers_move(name: str, state: Any, accumulate: int) -> None:
    model = make_llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = LayerScheduler(
        model, optimizer, Given((0, 2), (1,)), period=2, embeddings="freeze", state=state, check=True
    )
    for round in range(4):
        before = weights_of(model)
        assert scheduler.active == ((0, 2), (1,))[round % 2]
        train(model, optimizer, scheduler, range(round * 2, round * 2 + 2), accumulate)
        assert trained_layers(before, model) == set(((0, 2), (1,))[round % 2])
        assert "model.embed_tokens.weight" not in changed(before, model)
        assert {"lm_head.weight", "model.norm.weight"} <= changed(before, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_layers_are_full_fine_tuning_to_the_bit(name: str, accumulate: int) -> None:
    sampled, full = make_llama(), make_llama()
    optimizer = OPTIMIZERS[name](sampled.parameters())
    scheduler = LayerScheduler(sampled, optimizer, "lisa", num_active=4, period=2)
    train(sampled, optimizer, scheduler, range(7), accumulate)
    train(full, OPTIMIZERS[name](full.parameters()), None, range(7), accumulate)
    assert changed(weights_of(full), sampled) == set()


def test_matches_a_naive_loop_to_the_bit() -> None:
    """Against LISA written out: train all, put frozen weights and their state back."""
    sampled, naive = make_llama(), make_llama()
    optimizer = OPTIMIZERS["adamw"](sampled.parameters())
    sets = ((0, 3), (1, 2), (1, 3))
    scheduler = LayerScheduler(sampled, optimizer, Given(*sets), period=2)
    train(sampled, optimizer, scheduler, range(6))
    reference = OPTIMIZERS["adamw"](naive.parameters())
    for step in range(6):
        active = sets[step // 2]
        frozen = [
            p for n, p in naive.named_parameters() if ".layers." in n and int(n.split(".")[2]) not in active
        ]
        naive(**make_batch(step)).loss.backward()
        for p in frozen:
            p.grad = None
            reference.state.pop(p, None)
        nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    assert changed(weights_of(naive), sampled) == set()


def test_drop_keeps_optimizer_state_flat_and_keep_lets_it_grow() -> None:
    def state_bytes(state: Any) -> list[int]:
        model = make_llama(8)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        scheduler = LayerScheduler(model, optimizer, "lisa", num_active=2, period=1, state=state)
        sizes = []
        for step in range(20):
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            sizes.append(
                sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
            )
            scheduler.step()
            optimizer.zero_grad()
        return sizes

    assert max(flat := state_bytes("drop")) == flat[0]
    grown = state_bytes("keep")
    assert grown[-1] > 1.5 * grown[0]


def test_clears_gradients_of_what_it_freezes_before_they_can_be_used() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["sgd-momentum"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((0,), (1,)), period=1)
    model(**make_batch()).loss.backward()
    optimizer.step()
    scheduler.step()  # no zero_grad: the gradients of layer 0 are still there
    assert all(p.grad is None for p in model.model.layers[0].parameters())
    before = weights_of(model)
    model(**make_batch(1)).loss.backward()
    optimizer.step()
    assert trained_layers(before, model) == {1}


def test_leaves_param_groups_alone_and_gives_requires_grad_back() -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with LayerScheduler(model, optimizer, Given((0,), (1,)), period=1, check=True) as scheduler:
        train(model, optimizer, scheduler, range(5))
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == held
        assert not model.model.layers[1].mlp.up_proj.weight.requires_grad  # the user froze it
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_follows_a_learning_rate_schedule_to_the_bit() -> None:
    sampled, full = make_llama(), make_llama()
    results = []
    for model, sampler in ((sampled, "full"), (full, None)):
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10)
        scheduler = LayerScheduler(model, optimizer, sampler, num_active=2, period=3) if sampler else None
        for step in range(8):
            train(model, optimizer, scheduler, range(step, step + 1))
            schedule.step()
        results.append(weights_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("rules", "tie", "sampled", "always"),
    [
        ({}, False, 4, {"embed", "norm", "lm_head"}),
        ({"embeddings": "freeze"}, False, 4, {"norm", "lm_head"}),
        ({"embeddings": "sample"}, False, 5, {"norm", "lm_head"}),
        ({"embeddings": "sample", "head": "sample", "norm": "sample"}, False, 7, set()),
        ({"head": "freeze"}, True, 4, {"norm"}),
        ({"embeddings": "freeze"}, True, 4, {"norm"}),
        ({"embeddings": "sample", "head": "freeze"}, True, 4, {"norm"}),
        ({"embeddings": "sample"}, True, 5, {"norm"}),
    ],
)
def test_rules_for_embeddings_head_and_norm(
    rules: dict[str, Any], tie: bool, sampled: int, always: set[str]
) -> None:
    model = make_llama(tie=tie)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((sampled - 4,)), **rules)
    assert len(scheduler.layers) == sampled
    training = {n for n, p in model.named_parameters() if p.requires_grad and ".layers." not in n}
    assert {next(w for w in ("embed", "norm", "lm_head") if w in name) for name in training} - {
        "embed" if rules.get("embeddings") == "sample" and sampled - 4 == 0 else ""
    } == always


def test_sampled_embeddings_come_first_and_norm_and_head_last() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    rules: dict[str, Any] = {"embeddings": "sample", "norm": "sample", "head": "sample"}
    scheduler = LayerScheduler(model, optimizer, Given((0, 6)), num_active=7, **rules)
    assert scheduler.layers[0] == "embeddings" and scheduler.layers[-2:] == ("norm", "head")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_backward_ends_at_the_lowest_active_layer() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((2,)), embeddings="freeze")
    reached = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: reached.append(i) if out.requires_grad else None)
    model(**make_batch())
    assert reached == [2, 3]
    scheduler.close()


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-momentum", "adafactor"])
def test_resumes_in_the_middle_of_a_period_to_the_bit(name: str, state: Any, tmp_path: Any) -> None:
    def fresh() -> tuple[nn.Module, Optimizer, LayerScheduler]:
        model = make_llama()
        optimizer = OPTIMIZERS[name](model.parameters())
        return (
            model,
            optimizer,
            LayerScheduler(model, optimizer, "lisa", period=3, seed=5, state=state, check=True),
        )

    model, optimizer, scheduler = fresh()
    train(model, optimizer, scheduler, range(11))
    first, first_optimizer, first_scheduler = fresh()
    train(first, first_optimizer, first_scheduler, range(4))
    parts: dict[str, Any] = {"model": first, "optimizer": first_optimizer, "scheduler": first_scheduler}
    torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "checkpoint.pt")

    second, second_optimizer, second_scheduler = fresh()
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(stored["model"])
    second_optimizer.load_state_dict(stored["optimizer"])
    second_scheduler.load_state_dict(json.loads(json.dumps(stored["scheduler"])))
    assert second_scheduler.active == first_scheduler.active
    train(second, second_optimizer, second_scheduler, range(4, 11))
    assert changed(weights_of(model), second) == set()
    assert second_scheduler.state_dict() == scheduler.state_dict()


def test_optimizer_may_be_loaded_before_the_scheduler_is_made() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((0,), (3,)), period=2)
    train(model, optimizer, scheduler, range(3))
    optimizer_state, state = optimizer.state_dict(), scheduler.state_dict()
    scheduler.close()
    again = OPTIMIZERS["adamw"](model.parameters())
    again.load_state_dict(optimizer_state)
    LayerScheduler(model, again, Given((0,), (3,)), period=2).load_state_dict(state)
    assert all(p in again.state for p in model.model.layers[3].parameters())


@pytest.mark.parametrize(
    ("argument", "then", "now"),
    [("seed", 0, 1), ("period", 20, 10), ("num_active", 2, 3), ("sampler", "lisa", "cyclic")],
)
def test_refuses_to_resume_another_run(argument: str, then: Any, now: Any) -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with LayerScheduler(model, optimizer, **{"sampler": "lisa", argument: then}) as scheduler:
        state = scheduler.state_dict()
    other = LayerScheduler(model, optimizer, **{"sampler": "lisa", argument: now})
    with pytest.raises(ConfigError, match=f"{argument} it was begun with: it was {then!r}, but is {now!r}"):
        other.load_state_dict(state)


class Scored(MeasuredSampler):
    """Scores layers by an option, and notes what it was asked to measure.

    Args:
        first: Score of the first layer; that of each other one is 1.
    """

    def __init__(self, *, first: float = 1.0) -> None:
        super().__init__()
        self._first = first
        self.measured: list[int] = []

    def measure(self, measurement: Measurement) -> None:
        self.measured.append(len(measurement.changed))
        self.scores = {name: 1.0 for name in measurement.layers}
        self.scores[measurement.layers[0]] = self._first


@pytest.mark.parametrize("in_constructor", [True, False])
@pytest.mark.parametrize(
    ("then", "now", "measures"),
    [
        ({"sampler": "lisa"}, {"sampler": "scored"}, True),
        (
            {"sampler": "scored"},
            {"sampler": "scored", "sampler_options": {"first": 5.0}},
            True,
        ),
        ({"sampler": "scored"}, {"sampler": "scored", "seed": 1}, False),
        ({"sampler": "scored"}, {"sampler": "lisa"}, False),
    ],
)
def test_another_sampler_measures_where_it_takes_over(
    then: dict[str, Any], now: dict[str, Any], measures: bool, in_constructor: bool
) -> None:
    register("scored")(Scored)
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with LayerScheduler(model, optimizer, period=2, **then) as first:
        train(model, optimizer, first, range(3))
        saved = json.loads(json.dumps(first.state_dict()))
    if in_constructor:
        second = LayerScheduler(model, optimizer, period=2, allow_changes=True, state_dict=saved, **now)
    else:
        second = LayerScheduler(model, optimizer, period=2, allow_changes=True, **now)
        second.load_state_dict(saved)
    assert second.active == first.active
    if now["sampler"] == "scored":
        scores = list(second.sampler.state_dict()["scores"].values())
        assert scores == [now.get("sampler_options", {}).get("first", 1.0), 1.0, 1.0, 1.0]
        assert second.sampler.measured == [4] * (measures + (not in_constructor))  # type: ignore[attr-defined]
        assert second.state_dict()["changed"] == ([] if measures else saved["changed"])
    train(model, optimizer, second, range(3, 6))  # over a switch
    assert second.round == 3


def hooks_of(optimizer: Optimizer) -> dict[str, int]:
    return {key: len(value) for key, value in vars(optimizer).items() if key.endswith("_hooks")}


def test_a_scheduler_that_cannot_be_made_leaves_nothing_behind() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    options: dict[str, Any] = {
        "projection": "galore",
        "projection_options": {"rank": 4},
        "step_in_backward": StepInBackward(),
        "check": True,
    }
    before = hooks_of(optimizer)
    with pytest.raises(ConfigError, match="Given.sample must return distinct integers"):
        LayerScheduler(model, optimizer, Given((9,)), **options)
    with pytest.raises(ConfigError, match="must be resumed with the"):
        LayerScheduler(model, optimizer, Given((1,)), state_dict={}, **options)
    assert hooks_of(optimizer) == before
    assert all(p.requires_grad for p in model.parameters())
    with LayerScheduler(model, optimizer, Given((1,)), **options) as scheduler:
        model(**make_batch()).loss.backward()
        optimizer.step()
        scheduler.step()
        state = optimizer.state[model.model.layers[1].mlp.up_proj.weight]
        assert min(state["exp_avg"].shape) == 4


def test_an_optimizer_has_one_scheduler_at_a_time() -> None:
    from accelerate import Accelerator

    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    first = LayerScheduler(model, optimizer, Given((1,)))
    for again in (optimizer, Accelerator(cpu=True).prepare(optimizer)):
        with pytest.raises(ConfigError, match=r"still works on it.*: close\(\) the earlier one"):
            LayerScheduler(model, again, Given((1,)))
    assert first.active_layers == ("model.layers.1",)  # it goes on
    first.close()
    second = LayerScheduler(model, optimizer, Given((2,)))
    first.close()
    with pytest.raises(ConfigError, match="still works on it"):
        LayerScheduler(model, optimizer, Given((1,)))
    second.close()
    LayerScheduler(model, Accelerator(cpu=True).prepare(optimizer), Given((0,))).close()
    LayerScheduler(model, optimizer, Given((0,)))


def test_counts_visits() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    seen = []

    class Watch(Given):
        def sample(self, context: SamplingContext) -> tuple[int, ...]:
            seen.append(context.statistics)
            return super().sample(context)

    scheduler = LayerScheduler(model, optimizer, Watch((0, 2), (2,), (1,)), period=1)
    for _ in range(3):
        scheduler.step()
    assert seen[-1].visits == (1, 1, 2, 0)
    assert seen[-1].last_active == (0, 2, 1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "liza"}, "Unknown sampler 'liza'. Did you mean 'lisa'"),
        (
            {"sampler_options": {"drw": "exact"}},
            "Unknown option of sampler 'lisa' 'drw'. Did you mean 'draw'",
        ),
        ({"sampler_options": {"draw": "all"}}, "Option 'draw' of sampler 'lisa': .* but got 'all'"),
        ({"num_active": 0}, "num_active must be greater than or equal to 1, but got num_active=0"),
        ({"num_active": 5}, "num_active must be between 1 and the 4 layers .* but got num_active=5"),
        ({"period": 2.5}, "period must be a valid integer.*, but got period=2.5"),
        ({"period": float("nan")}, "period must be a valid integer.*, but got period=nan"),
        ({"period": "3"}, "period must be a whole number, not text, but got period='3'"),
        ({"num_active": "2"}, "num_active must be a whole number, not text"),
        ({"check": "yes"}, "check must be true or false, not text, but got check='yes'"),
        ({"master_weights": 1}, "master_weights must be true or false, but got master_weights=1"),
        ({"period": True}, "period must not be true or false, but got period=True"),
        ({"seed": -1}, "seed must be greater than or equal to 0, but got seed=-1"),
        ({"step_in_backward": "yes"}, "step_in_backward must be a StepInBackward, True or False"),
        ({"period": 0}, "period must be greater than or equal to 1, but got period=0"),
        ({"state": "forget"}, "state must be 'drop', 'keep' or 'offload', but got state='forget'"),
        ({"head": "melt"}, "head must be 'train', 'freeze' or 'sample', but got head='melt'"),
        ({"layers": "model.lairs"}, "layers='model.lairs' must be the path of a ModuleList"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ConfigError, match=message):
        LayerScheduler(model, optimizer, **{"sampler": "lisa", **arguments})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    model = make_llama()
    options: dict[str, Any] = {
        "num_active": np.int64(3),
        "period": torch.tensor(5),
        "seed": np.uint8(7),
        "check": np.bool_(True),
    }
    with LayerScheduler(model, OPTIMIZERS["adamw"](model.parameters()), **options) as scheduler:
        found = (scheduler.num_active, scheduler.period, scheduler.seed, scheduler.options.check)
        assert found == (3, 5, 7, True) and {type(value) for value in found} == {int, bool}
        scheduler.advance_to(np.int64(5))  # type: ignore[arg-type]
        assert scheduler.round == 1
        with pytest.raises(ConfigError, match="steps must be a whole number, not text"):
            scheduler.advance_to("6")  # type: ignore[arg-type]
        json.dumps(scheduler.state_dict())


def test_an_optimizer_built_while_layers_were_frozen_is_refused() -> None:
    model = make_llama()
    model.model.layers[3].requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match=r"but model.layers.3 has none. Unfreeze them before"):
        LayerScheduler(model, optimizer, "lisa")
    model.model.layers[3].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"lacks model.layers.3.self_attn.q_proj.weight.* and 4 more"):
        LayerScheduler(model, optimizer, "lisa")


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold this model's parameters, but holds none"):
        LayerScheduler(make_llama(), OPTIMIZERS["adamw"](make_llama().parameters()), "lisa")


@pytest.mark.parametrize("chosen", [(4,), (-1,), (0, 0), (0.5,), ("0",)])
def test_a_sampler_that_returns_nonsense_is_named(chosen: Any) -> None:
    model = make_llama()
    with pytest.raises(
        ValueError, match=r"Given.sample must return distinct integers from 0 to 3, but returned"
    ):
        LayerScheduler(model, OPTIMIZERS["adamw"](model.parameters()), Given(chosen))


def test_a_period_without_any_layer_needs_something_that_trains() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    LayerScheduler(model, optimizer, Given(()))  # the embedding trains
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ValueError, match="returned no layer in period 0, and nothing else trains"):
        LayerScheduler(model, optimizer, Given(()), embeddings="freeze", head="freeze", norm="freeze")


def test_self_check_sees_what_goes_wrong() -> None:
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((0,)), period=1, check=True)
    model(**make_batch()).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight += 1
    with pytest.raises(
        SelfCheckError, match="layers.2.mlp.up_proj.weight was frozen .* but its weights changed"
    ):
        scheduler.step()


def test_plain_modules_by_path_or_list() -> None:
    last = nn.Linear(4, 4)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), last), nn.Linear(4, 2))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    by_path = LayerScheduler(model, optimizer, "lisa", num_active=1, layers="1")
    assert by_path.layers == ("1.0", "1.1")
    by_path.close()
    by_list = LayerScheduler(model, optimizer, "lisa", num_active=1, layers=[last, "2"])
    assert by_list.layers == ("1.1", "2")


def test_evaluation_in_the_middle_changes_nothing() -> None:
    runs = []
    for evaluate in (False, True):
        model = make_llama()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        scheduler = LayerScheduler(model, optimizer, "lisa", period=2)
        for step in range(6):
            train(model, optimizer, scheduler, range(step, step + 1))
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(**make_batch(99))
                model.train()
        runs.append(weights_of(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_bf16_autocast_and_grad_scaler() -> None:
    """A scaler that skips a step (overflow) must not move anything; the period goes on."""
    model = make_llama()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, Given((0,), (2,)), period=2, check=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        before = weights_of(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**make_batch(step)).loss
        scaler.scale(loss).backward()
        overflows = step == 1
        if overflows:
            model.model.layers[0].mlp.up_proj.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        assert bool(changed(before, model)) != overflows
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_per_layer_compile_makes_a_constant_number_of_graphs() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model = make_llama(6)
    for layer in model.model.layers:
        layer.compile(backend=count)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scheduler = LayerScheduler(model, optimizer, "lisa", num_active=2, period=1, embeddings="freeze")
    counts = []
    for step in range(12):
        train(model, optimizer, scheduler, range(step, step + 1))
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[-1] == counts[5], "later sets of layers compile nothing new"
    assert counts[-1] <= 8


def test_accelerate_counts_optimizer_steps_not_micro_batches() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = make_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    scheduler = LayerScheduler(model, optimizer, Given((0,), (1,)), period=2, check=True)
    for micro in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(model(**make_batch(micro)).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert scheduler.steps == 4
    assert scheduler.round == 2


def test_find_layers_is_what_the_scheduler_uses() -> None:
    model = make_llama()
    scheduler = LayerScheduler(model, OPTIMIZERS["adamw"](model.parameters()), "lisa")
    assert scheduler.layers == tuple(layer.name for layer in find_layers(model).layers)
