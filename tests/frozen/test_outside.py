"""Somebody else's code and frozen weights: what it writes is refused by name, and what it reads is exact or NaN."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from layersample import ConfigError, LayerScheduler
from tests.helpers import Given, make_batch, make_llama

OWN = "model.layers.2.mlp.up_proj"
NAME = f"{OWN}.weight"
Run = tuple[Any, torch.optim.Optimizer, LayerScheduler]


def make_run() -> Run:
    """Layer 1 trains for two steps, then layer 0."""
    model = make_llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"num_active": 1, "period": 2, "frozen_weights": "int8"}
    return model, optimizer, LayerScheduler(model, optimizer, Given((1,), (0,)), **options)


def step(run: Run) -> None:
    model, optimizer, scheduler = run
    model(**make_batch()).loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def write_data(model: Any) -> None:
    model.get_parameter(NAME).data = torch.ones(32, 16)


def write_all(model: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(torch.full((count,), 0.01), model.parameters())


def replace(model: Any) -> None:
    model.get_submodule(OWN).weight = nn.Parameter(torch.ones(32, 16))


def tie(model: Any) -> None:
    model.get_submodule(OWN).weight = model.model.layers[1].mlp.up_proj.weight


def take_out(model: Any) -> None:
    del model.get_submodule(OWN).weight


WRITES: dict[Callable[[Any], None], str] = {
    write_data: "written to",
    write_all: "written to",
    replace: "replaced",
    tie: "replaced",
    take_out: "taken out of its module",
}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("noticed", ["saved", "switched", "closed", "shown"])
def test_what_is_written_to_a_frozen_weight_is_refused_and_undone(
    write: Callable[[Any], None], noticed: str, caplog: Any
) -> None:
    run = model, optimizer, scheduler = make_run()
    step(run)
    model(**make_batch()).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write(model)
    said = rf"must be left alone .* {WRITES[write]}.*this was undone.*load_state_dict"
    if noticed == "closed":
        scheduler.close()
        assert re.search(said, caplog.text)
    elif noticed == "saved" and write is take_out:
        assert NAME not in model.state_dict()  # as of any model
    else:
        with pytest.raises(ConfigError, match=said):
            if noticed == "saved":
                model.state_dict()
            elif noticed == "switched":
                optimizer.step()
                scheduler.step()
            else:
                scheduler.exact_weights().__enter__()
    scheduler.close()
    assert torch.equal(model.state_dict()[NAME], before[NAME])


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_forward_doesn_t_ignore_what_was_written(write: Callable[[Any], None]) -> None:
    run = model, _, scheduler = make_run()
    step(run)
    exact = model.state_dict()[NAME].clone()
    write(model)
    said = "must be left alone" if WRITES[write] == "written to" else "which would be ignored: leave .* out"
    with pytest.raises(ConfigError, match=rf"{said}"):
        model(**make_batch())
    scheduler.close()
    assert torch.equal(model.state_dict()[NAME], exact)


ONES, BATCH = torch.ones(32, 16), make_batch()


def by_functional_call(model: Any) -> Any:
    return functional_call(model, {NAME: ONES}, (), make_batch()).loss


def by_stateless(model: Any) -> Any:
    with pytest.warns(FutureWarning):
        return nn.utils.stateless.functional_call(model, {NAME: ONES}, (), make_batch()).loss


def by_a_gradient(model: Any) -> Any:
    def loss(weight: Tensor) -> Tensor:
        given: Tensor = functional_call(model, {NAME: weight}, (), BATCH).loss
        return given

    return torch.func.grad(loss)(model.get_parameter(NAME).detach()).norm()


def by_autograd(model: Any) -> Any:
    weight = model.get_parameter(NAME).detach().requires_grad_()
    loss = functional_call(model, {NAME: weight}, (), make_batch()).loss
    return torch.autograd.grad(loss, weight)[0].norm()


def by_vmap(model: Any) -> Any:
    def loss(weight: Tensor) -> Tensor:
        given: Tensor = functional_call(model, {NAME: weight}, (), BATCH).loss
        return given

    return torch.vmap(loss)(torch.stack([ONES, ONES]))[0]


def by_a_parametrization(model: Any) -> Any:
    module = model.get_submodule(OWN)
    parametrize.register_parametrization(module, "weight", nn.Softplus(), unsafe=True)
    try:
        return model(**make_batch()).loss
    finally:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def by_pruning(model: Any) -> Any:
    module = model.get_submodule(OWN)
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]
    try:
        return model(**make_batch()).loss
    finally:
        prune.remove(module, "weight")  # type: ignore[no-untyped-call]


def by_a_swap(model: Any) -> Any:
    held = model.get_submodule(OWN)._parameters
    mine, held["weight"] = held["weight"], nn.Parameter(ONES)
    try:
        return model(**make_batch()).loss
    finally:
        held["weight"] = mine


GIVES = (
    *(by_functional_call, by_stateless, by_a_gradient, by_autograd, by_vmap),
    *(by_a_parametrization, by_pruning, by_a_swap),
)


@pytest.mark.parametrize("give", GIVES, ids=lambda give: give.__name__)
def test_values_that_are_given_for_a_forward_are_never_ignored(give: Callable[[Any], Any]) -> None:
    model, _, scheduler = make_run()
    loss = model(**make_batch()).loss
    transforms = give in (by_a_gradient, by_vmap)
    said = "torch.func's transforms" if transforms else f"in the place of {NAME} .*which would be ignored"
    with pytest.raises(ConfigError, match=f"{said}.* within scheduler.exact_weights"):
        give(model)
    assert model(**make_batch()).loss == loss, "the refusal changes nothing"
    if give not in (by_a_parametrization, by_pruning):  # those write to what is only shown
        plain = make_llama(3)
        with scheduler.exact_weights():
            torch.testing.assert_close(give(model), give(plain))


def test_values_for_what_trains_and_views_of_the_model_s_own_are_taken() -> None:
    model, _, _ = make_run()
    trains = NAME.replace("layers.2", "layers.1")
    before = model(**make_batch()).loss
    assert functional_call(model, {trains: ONES}, (), make_batch()).loss != before
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert functional_call(model, own, (), make_batch()).loss == before
    assert functional_call(model, dict(model.named_parameters()), (), make_batch()).loss == before


def test_a_state_that_is_loaded_is_taken() -> None:
    run = model, _, _ = make_run()
    step(run)
    model.load_state_dict({NAME: torch.ones(32, 16)}, strict=False)
    step(run)
    assert torch.equal(model.state_dict()[NAME], torch.ones(32, 16))


def test_what_writes_in_place_is_stopped_by_torch() -> None:
    run = model, _, _ = make_run()
    for write in (lambda weight: weight.mul_(2), lambda weight: weight.copy_(torch.ones(32, 16))):
        with torch.no_grad(), pytest.raises(RuntimeError, match="more than one element"):
            write(model.get_parameter(NAME))  # type: ignore[no-untyped-call]
    step(run)


def test_what_reads_parameters_sees_no_number_or_exact_ones() -> None:
    model, _, scheduler = make_run()
    assert nn.utils.parameters_to_vector(model.get_submodule(OWN).parameters()).isnan().all()
    with scheduler.exact_weights():
        exact = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(exact, nn.utils.parameters_to_vector(model.state_dict().values()))


def test_an_average_of_weights_is_that_of_exact_ones() -> None:
    run = model, _, scheduler = make_run()
    with scheduler.exact_weights():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))  # type: ignore[no-untyped-call]
    expected: dict[str, Tensor] = {}
    for number in range(5):
        step(run)
        with scheduler.exact_weights():
            average.update_parameters(model)
        for name, value in model.state_dict().items():
            expected[name] = expected[name].lerp(value, 0.5) if number else value.clone()
    found = average.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert average(**make_batch()).loss.isfinite()


def test_a_pickled_model_is_whole_in_itself() -> None:
    run = model, _, _ = make_run()
    step(run)
    again = pickle.loads(pickle.dumps(model))
    assert again(**make_batch()).loss == model(**make_batch()).loss
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.get_parameter(NAME).untyped_storage().nbytes() == 4


def test_the_meta_device_is_refused() -> None:
    model, _, scheduler = make_run()
    with pytest.raises(ConfigError, match="on a device that holds values"):
        model.to("meta")
    scheduler.close()
