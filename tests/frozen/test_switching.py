"""Switches of layers whose frozen weights are rounded, against a run that keeps all exact values beside."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layersample import (
    Checkpoints,
    ConfigError,
    LayerSampler,
    LayerScheduler,
    Measurement,
    SamplingContext,
    StepInBackward,
    measure_memory,
)
from layersample.activations.save_memory import save_memory
from layersample.frozen.formats import FORMATS
from layersample.optim.memory_use import count_bytes
from tests.helpers import Given, make_batch, make_llama, weights_of

LAYERS = 4
CASES: dict[str, dict[str, Any]] = {
    "masters": {},
    "no-masters": {"master_weights": False},
    "keep": {"state": "keep"},
    "offload": {"state": "offload", "embeddings": "freeze"},
    "in-backward": {"step_in_backward": StepInBackward()},
    "projection": {"projection": "galore", "projection_options": {"rank": 4, "update_gap": 2}},
    "sampled-ends": {"embeddings": "sample", "head": "sample", "norm": "sample"},
}


def random_sets(rounds: int, seed: int = 0, first: int = 0) -> list[tuple[int, ...]]:
    drawn = random.Random(seed)
    return [
        tuple(sorted(drawn.sample(range(first, first + LAYERS), drawn.choice((1, 2))))) for _ in range(rounds)
    ]


def make_run(
    model: nn.Module, sets: list[tuple[int, ...]], **options: Any
) -> tuple[torch.optim.Optimizer, LayerScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return optimizer, LayerScheduler(model, optimizer, Given(*sets), period=1, check=True, **options)


@contextlib.contextmanager
def rounded(model: nn.Module, names: tuple[str, ...], form: str) -> Iterator[None]:
    """The naive way: exact values beside, and rounded ones in the place of what doesn't train."""
    chosen, exact = FORMATS.create(form), {}
    for name, parameter in model.named_parameters():
        if name in names and not parameter.requires_grad:
            exact[parameter] = parameter.data
            shape = (parameter.shape[0], parameter.shape[1])
            parameter.data = chosen.dequantize(chosen.quantize(parameter.data), shape, parameter.dtype)
    yield
    for parameter, values in exact.items():
        parameter.data = values


def step(
    model: nn.Module, optimizer: Any, scheduler: LayerScheduler, number: int, around: Any = None
) -> None:
    with around or contextlib.nullcontext():
        model(**make_batch(number)).loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES]
    + [(case, torch.float32) for case in CASES if case != "no-masters"],  # fp32 has none anyway
)
def test_exact_weights_are_those_of_a_run_that_keeps_them_beside(
    case: str, dtype: torch.dtype, form: str
) -> None:
    # The others' 50 take a minute: they are equal to the bit as well.
    switches = 50 if (case, dtype) == ("masters", torch.bfloat16) else 8
    options, sets = CASES[case], random_sets(switches, first=CASES[case].get("embeddings") == "sample")
    reference, model = make_llama(LAYERS, dtype=dtype), make_llama(LAYERS, dtype=dtype)
    start = weights_of(model)
    optimizer, scheduler = make_run(model, sets, frozen_weights=form, **options)
    assert scheduler.frozen is not None
    names = scheduler.frozen.names
    with scheduler:
        other_optimizer, other = make_run(reference, sets, **options)
        for number in range(len(sets)):
            step(model, optimizer, scheduler, number)
            step(reference, other_optimizer, other, number, rounded(reference, names, form))
        assert scheduler.active == other.active
        for state, expected in (
            (model.state_dict(), reference.state_dict()),
            (scheduler.fp32_state_dict(), other.fp32_state_dict()),
            (scheduler.trained_state_dict(), reference.state_dict()),
        ):
            assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert sum(not torch.equal(p, start[name]) for name, p in reference.named_parameters()) > len(names)
    assert all(map(torch.equal, model.parameters(), reference.parameters()))  # whole again
    with rounded(reference, names, form):  # or the test would hold without any rounding
        assert not all(map(torch.equal, model.parameters(), reference.parameters()))


def checkpointed(model: Any, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})


COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool | None]] = {
    "all savers": ({"step_in_backward": StepInBackward()}, {"loss_chunk": 8, "recompute": True}, None),
    "checkpointed": (
        {"step_in_backward": StepInBackward(max_norm=1.0)},
        {"loss_chunk": 8, "recompute": True, "gradient_checkpointing": True},
        None,
    ),
    "reentrant": ({"step_in_backward": StepInBackward()}, {"loss_chunk": 8, "recompute": False}, True),
    "reentrant, projected": (CASES["projection"], {"loss_chunk": None, "recompute": True}, True),
    "not reentrant, offloaded": (CASES["offload"], {"loss_chunk": 8, "recompute": True}, False),
}


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("case", COMBINATIONS)
def test_whatever_else_saves_memory_goes_with_it(case: str, form: str) -> None:
    options, saving, reentrant = COMBINATIONS[case]
    sets = random_sets(12, seed=3)
    runs: list[tuple[dict[str, torch.Tensor], tuple[str, ...]]] = []
    for given in (form, None):
        model = make_llama(LAYERS, dtype=torch.bfloat16).train()
        if reentrant is not None:
            checkpointed(model, reentrant)
        with save_memory(model, **saving):
            optimizer, scheduler = make_run(model, sets, frozen_weights=given, **options)
            names = scheduler.frozen.names if scheduler.frozen is not None else runs[0][1]
            with scheduler:
                for number in range(len(sets)):
                    step(model, optimizer, scheduler, number, None if given else rounded(model, names, form))
                runs.append((scheduler.fp32_state_dict(), names))
    (found, names), (expected, _) = runs
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    start = make_llama(LAYERS, dtype=torch.bfloat16).state_dict()
    assert all(not torch.equal(found[name], start[name].float()) for name in names)


@pytest.mark.parametrize("case", ["masters", "keep", "in-backward", "projection"])
@pytest.mark.parametrize("made_first", [True, False])
def test_resumes_in_the_middle_of_a_period_to_the_bit(case: str, made_first: bool, tmp_path: Path) -> None:
    options = {"period": 3, "seed": 5, "check": True, "frozen_weights": "nf4", **CASES[case]}

    def fresh() -> tuple[nn.Module, Any]:
        model = make_llama(LAYERS, dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    scheduler = LayerScheduler(model, optimizer, "lisa", **options)
    for number in range(11):
        if number == 4:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
        step(model, optimizer, scheduler, number)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second, second_optimizer = fresh()
    if made_first:
        again = LayerScheduler(second, second_optimizer, "lisa", **options)
    second.load_state_dict(stored["model"])
    second_optimizer.load_state_dict(stored["optimizer"])
    if made_first:
        again.load_state_dict(json.loads(json.dumps(stored["scheduler"])))
    else:
        again = LayerScheduler(second, second_optimizer, "lisa", state_dict=stored["scheduler"], **options)
    for number in range(4, 11):
        step(second, second_optimizer, again, number)
    expected = scheduler.fp32_state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.fp32_state_dict().items())
    with pytest.raises(
        ConfigError, match="frozen_weights it was begun with: it was 'nf4', but is 'int8' now"
    ):
        again.close()
        LayerScheduler(
            second,
            second_optimizer,
            "lisa",
            state_dict=stored["scheduler"],
            **{**options, "frozen_weights": "int8"},
        )


def test_a_killed_run_goes_on_to_the_bit_and_reads_its_file(tmp_path: Path) -> None:
    make_llama(LAYERS, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")

    def run(folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = LayerScheduler(model, optimizer, "lisa", num_active=1, period=3, frozen_weights="int8")
        parts: Any = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        checkpoints = Checkpoints(folder, parts)
        for number in range(checkpoints.load_last(), 7):
            step(model, optimizer, scheduler, number)
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(number + 1)
        assert scheduler.frozen is not None and scheduler.frozen.mapped  # a layer that never trained
        return scheduler.fp32_state_dict()

    expected = run(tmp_path / "whole")
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        run(tmp_path / "killed", stop=4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


class Looks(LayerSampler):
    """Notes the weights that it is shown."""

    measure_every = 1

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def measure(self, measurement: Measurement) -> None:
        self.seen.append(weights_of(measurement.model))

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        return (context.round % LAYERS,)


def test_a_sampler_measures_exact_weights() -> None:
    seen = []
    for form in (None, "nf4"):
        model = make_llama(LAYERS, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        sampler = Looks()
        with LayerScheduler(
            model, optimizer, sampler, period=1, num_active=1, frozen_weights=form
        ) as scheduler:
            for number in range(3):
                step(model, optimizer, scheduler, number)
        seen.append(sampler.seen)
    for exact, ours in zip(*seen, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in exact.items())
    assert len(seen[0]) == 4


def test_an_evaluation_with_exact_weights_is_that_of_what_is_saved(tmp_path: Path) -> None:
    model = make_llama(LAYERS, dtype=torch.bfloat16)
    optimizer, scheduler = make_run(model, [(0,)], frozen_weights="nf4")
    step(model, optimizer, scheduler, 0)
    model.eval()
    with torch.no_grad():
        as_trained = model(**make_batch()).loss
        with scheduler.exact_weights():
            as_saved = model(**make_batch()).loss
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    again: Any = make_llama(LAYERS, dtype=torch.bfloat16).eval()
    # Not as they lie in the file, where tensors aren't aligned: on processors without bf16 the last bit depends on it.
    again.load_state_dict(saved.state_dict())
    with torch.no_grad():
        loaded = again(**make_batch()).loss
    assert torch.equal(loaded, as_saved) and not torch.equal(as_trained, as_saved)


def test_memory_counts_codes_on_the_device_and_exact_values_beside() -> None:
    model = make_llama(LAYERS, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    whole = measure_memory(model, optimizer).weights
    scheduler = LayerScheduler(model, optimizer, Given((1,)), num_active=1, frozen_weights="int8")
    use, frozen = measure_memory(model, optimizer), scheduler.frozen
    assert frozen is not None and use.host_weights == frozen.host_bytes > 0
    stubs = sum(2 for name in frozen.names if not name.startswith("model.layers.1."))
    assert use.weights == whole - frozen.host_bytes + frozen.device_bytes + stubs
    scheduler.close()
    assert (
        measure_memory(model, optimizer).weights
        == whole
        == count_bytes([*model.parameters(), *model.buffers()])
    )


def test_a_scheduler_that_cannot_be_made_leaves_the_model_whole() -> None:
    model = make_llama(LAYERS)
    before = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    problems: tuple[tuple[dict[str, Any], str], ...] = (
        ({"sampler": Given((9,))}, "distinct integers"),
        ({"frozen_weights": "int4"}, "Unknown format of frozen weights 'int4'. Did you mean 'int8'"),
    )
    for problem, said in problems:
        with pytest.raises(ConfigError, match=said):
            LayerScheduler(model, optimizer, **{"sampler": Given((1,)), "frozen_weights": "nf4", **problem})
        assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
        assert all(not {"forward", "_apply"} & vars(module).keys() for module in model.modules())


def test_a_copy_of_the_model_is_whole_in_itself() -> None:
    model = make_llama(LAYERS)
    optimizer, scheduler = make_run(model, [(0,)], frozen_weights="nf4")
    copied = copy.deepcopy(model)
    expected = copied(**make_batch()).loss
    assert torch.equal(expected, model(**make_batch()).loss)
    state = {name: value.clone() for name, value in copied.state_dict().items()}
    step(model, optimizer, scheduler, 0)
    assert torch.equal(copied(**make_batch()).loss, expected)
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
