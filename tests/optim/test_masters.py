"""bf16 weights that lose no update, against a loop that keeps fp32 masters of everything, always."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from layersample import LayerScheduler, create_projection, measure_memory
from layersample.checkpoints.sharded import load_distributed, save_distributed
from layersample.choices import StatePolicyName
from layersample.optim import masters
from layersample.optim.masters import EXCEPTIONS, MASTER, REMAINDER, add, combine, follow, split
from layersample.optim.packing import _placed
from tests.helpers import make_batch, make_llama

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "adamw-small-steps": lambda p: torch.optim.AdamW(p, lr=1e-6),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-5),
}
# Without masters their own state is fp32 too, in part.
WIDE_OPTIMIZERS: dict[str, Any] = {
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adafactor-transformers": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
}


def every_kind_of_value() -> Tensor:
    """Bit patterns of fp32: all low halves over a few high ones, subnormals, and both ends of the range."""
    high = torch.tensor(
        [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, -0x8000, -0x4080, -0x0081], dtype=torch.int32
    )
    low = torch.arange(2**16, dtype=torch.int32)
    bits = (high.unsqueeze(1) << 16) | low
    return bits.flatten().view(torch.float32)


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_value_comes_back_to_the_bit(deterministic: bool, request: pytest.FixtureRequest) -> None:
    torch.use_deterministic_algorithms(deterministic)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    exact = every_kind_of_value()
    weight = exact.bfloat16()
    kept = split(exact, weight)
    assert kept[REMAINDER].dtype == torch.int16 and kept[REMAINDER].shape == exact.shape
    assert torch.equal(combine(weight, kept).view(torch.int32), exact.view(torch.int32))
    # Ties that round down to an even number, one in 2¹⁷, and what rounds to zero, half of two high halves.
    assert kept[EXCEPTIONS].numel() == pytest.approx(exact.numel() / 2**17 + 2**16, abs=6)
    assert weight.isinf().any()  # the largest numbers round to infinity, and come back


def test_what_has_no_zeros_is_kept_as_beside_zeros() -> None:
    """On CPUs a tensor without zeros is looked at in another, faster way."""
    exact = every_kind_of_value()
    exact = exact[exact.bfloat16() != 0]
    weight = exact.bfloat16()
    zero = torch.zeros(1)
    kept, beside = split(exact, weight), split(torch.cat([exact, zero]), torch.cat([weight, zero.bfloat16()]))
    assert kept.keys() == beside.keys()
    for key, value in beside.items():
        assert torch.equal(kept[key], value[:-1] if key == REMAINDER else value)
    assert torch.equal(combine(weight, kept).view(torch.int32), exact.view(torch.int32))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_adding_in_pieces_is_adding(zeros: bool, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 2**12, generator=generator)
    if zeros:
        exact[::7] = 0.0
    exact[:, ::50] = exact[:, ::50].bfloat16().float()
    exact.view(torch.int32)[:, ::50] += 2**15  # ties, of which half are exceptions
    weight = exact.bfloat16()
    state = split(exact, weight) if trained else {}
    change = torch.randn(64, 2**12, generator=generator).bfloat16()
    change[:, ::100] = 0.0  # so that exceptions stay exceptions
    whole, in_pieces = weight.clone(), weight.clone()
    monkeypatch.setattr(masters, "_PIECE", 10**9)
    kept = add(whole, state, change, alpha=-1e-3)
    monkeypatch.setattr(masters, "_PIECE", 3000)  # not a divisor
    kept_in_pieces = add(in_pieces, state, change, alpha=-1e-3)
    assert torch.equal(whole.view(torch.int16), in_pieces.view(torch.int16))
    assert kept.keys() == kept_in_pieces.keys()
    assert all(torch.equal(value, kept_in_pieces[key]) for key, value in kept.items())
    rows = weight.t().clone().t()  # not contiguous
    assert torch.equal(
        combine(rows, add(rows, state, change, alpha=-1e-3)), combine(in_pieces, kept_in_pieces)
    )
    if trained:
        assert EXCEPTIONS in kept
        expected = exact.add(change.float(), alpha=-1e-3)
        assert torch.equal(combine(whole, kept), expected)


def test_special_values_come_back() -> None:
    exact = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-45, 3.4e38])
    back = combine(exact.bfloat16(), split(exact, exact.bfloat16()))
    assert torch.equal(back.view(torch.int32), exact.view(torch.int32))


EVERY_WEIGHT = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def _never(*args: Any) -> Tensor:
    raise AssertionError("compares values")


def assert_weight_wins(weight: Tensor, exact: Tensor) -> None:
    rounded = exact.to(torch.bfloat16)
    assert torch.equal(rounded.isnan(), weight.isnan())
    assert bool(((rounded == weight) | weight.isnan()).all())
    assert not bool(exact[weight == 0].any())  # a pruned weight is zero, not nearly


# All signs of a remainder, ties and their neighbours, and others between them: a few hundred, or each seventh.
EDGES = {0, 1, -1, 2**15 - 1, -(2**15), -(2**15) + 1}
SOME_REMAINDERS, MANY_REMAINDERS = (
    sorted({*EDGES, *range(-(2**15), 2**15, step)})
    for step in (197, 7)  # odd: every pattern of low bits comes
)


@pytest.mark.parametrize(
    "remainders",
    [
        pytest.param(SOME_REMAINDERS, id="some"),
        pytest.param(MANY_REMAINDERS, id="many", marks=pytest.mark.slow),
    ],
)
def test_whatever_was_written_to_a_frozen_weight_wins(
    remainders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit pattern of a weight against remainders of any other value that it had before."""
    for remainder in remainders:
        kept = {REMAINDER: torch.full(EVERY_WEIGHT.shape, remainder, dtype=torch.int16)}
        exact = combine(EVERY_WEIGHT, kept)
        assert_weight_wins(EVERY_WEIGHT, exact)
        # Those that it could be of, without zeros: on CPUs they are looked at in another, faster way.
        theirs = exact.view(torch.int32) - masters._bits(EVERY_WEIGHT) == remainder
        some = (EVERY_WEIGHT != 0) & theirs & ~EVERY_WEIGHT.isnan()
        assert some.any()
        with monkeypatch.context() as patch:
            patch.setattr(masters, "_agree", _never)
            of_some = combine(EVERY_WEIGHT[some], {REMAINDER: kept[REMAINDER][some]})
        assert torch.equal(of_some.view(torch.int32), exact[some].view(torch.int32))


def test_whatever_is_written_between_split_and_combine_wins() -> None:
    """Every weight over masters of every kind, exceptions among them, written before the layer freezes or after."""
    kinds = [0x00000001, 0x00007FFF, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    signs = (0, -(2**31))
    bits = torch.tensor([kind + sign for kind in kinds for sign in signs], dtype=torch.int64).to(torch.int32)
    for master in bits.view(torch.float32):
        exact = torch.full(EVERY_WEIGHT.shape, 1.0).copy_(master)
        agree = (exact.bfloat16() == EVERY_WEIGHT) | (exact.isnan() & EVERY_WEIGHT.isnan())
        for kept in (split(exact, EVERY_WEIGHT), split(exact, exact.bfloat16())):
            back = combine(EVERY_WEIGHT, kept)
            assert_weight_wins(EVERY_WEIGHT[~agree], back[~agree])
            assert torch.equal(back[agree].isnan(), exact[agree].isnan())
            assert bool((back[agree] == exact[agree])[~exact[agree].isnan()].all())
        followed = follow(exact.clone(), EVERY_WEIGHT)
        assert_weight_wins(EVERY_WEIGHT[~agree], followed[~agree])


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_a_pruned_layer_trains_on_from_what_was_written(state: Any) -> None:
    """Half of a frozen layer's weights set to zero, against masters that are set to zero as well."""
    options = {"state": state, "check": False, "sampler_options": {"order": "ascending"}}
    _, scheduler = run(4, **options)  # layers 0 and 1 are frozen, until step 6
    model: Any = scheduler._model
    optimizer = scheduler.optimizer
    weight = model.model.layers[0].mlp.up_proj.weight
    before = scheduler.fp32_state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    kept = weight.abs() > weight.abs().median()
    with torch.no_grad():
        weight.mul_(kept)
    exact = scheduler.fp32_state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(exact, before * kept)
    for step in range(4, 7):
        model(**make_batch(step)).loss.backward()
        if step == 6:
            gradient = weight.grad.clone()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    trained = scheduler.fp32_state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert all(bool(value.isfinite().all()) for value in scheduler.fp32_state_dict().values())
    if state == "drop":
        twin = nn.Parameter(before * kept)
        twin.grad = gradient.float()
        OPTIMIZERS["adamw"]([twin]).step()
        assert torch.equal(trained, twin.detach())


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
def test_special_values_written_to_a_frozen_layer_stay_in_their_place(value: float) -> None:
    _, scheduler = run(4, check=False, sampler_options={"order": "ascending"})
    model: Any = scheduler._model
    weight = model.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        weight[0] = value
    exact = scheduler.fp32_state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert_weight_wins(weight.detach().flatten(), exact.flatten())
    assert bool(exact[1:].isfinite().all())


def test_a_weight_that_has_not_trained_is_what_it_is() -> None:
    weight = torch.randn(5).bfloat16()
    assert torch.equal(combine(weight, {}), weight.float())


def reference(steps: int, optimizer_name: str, state: str, period: int = 3) -> dict[str, Tensor]:
    """bf16 forward and backward, fp32 masters of everything; layers in turns, their state as the policy says."""
    model = make_llama(dtype=torch.bfloat16)
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    fp32 = {name: nn.Parameter(value) for name, value in masters.items()}
    optimizer = OPTIMIZERS[optimizer_name](fp32.values())
    for step in range(steps):
        active = {(step // period * 2) % 4, (step // period * 2 + 1) % 4}
        model.zero_grad()
        model(**make_batch(step)).loss.backward()
        for name, parameter in model.named_parameters():
            part = name.split(".")
            trains = part[1] != "layers" or int(part[2]) in active
            fp32[name].grad = None
            if trains:
                assert parameter.grad is not None
                fp32[name].grad = parameter.grad.float()
            if not trains and state == "drop":
                optimizer.state.pop(fp32[name], None)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(fp32[name])
    return {name: value.detach() for name, value in fp32.items()}


def run(
    steps: int,
    optimizer_name: str = "adamw",
    state: StatePolicyName = "drop",
    *,
    stop: int | None = None,
    folder: Path | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], LayerScheduler]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler]:
        model = make_llama(dtype=torch.bfloat16)
        optimizer = {**OPTIMIZERS, **WIDE_OPTIMIZERS}[optimizer_name](model.parameters())
        scheduler = LayerScheduler(
            model, optimizer, "cyclic", num_active=2, period=3, state=state, **{"check": True, **options}
        )
        return model, optimizer, scheduler

    model, optimizer, scheduler = build()
    for step in range(steps):
        if step == stop:
            assert folder is not None
            parts = {"m": model.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict()}
            torch.save(parts, folder / "checkpoint.pt")
            model, optimizer, scheduler = build()
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            model.load_state_dict(saved["m"])
            optimizer.load_state_dict(saved["o"])
            scheduler.load_state_dict(saved["s"])
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return scheduler.fp32_state_dict(), scheduler


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_masters_of_everything(name: str, state: StatePolicyName) -> None:
    exact, scheduler = run(14, name, state, sampler_options={"order": "ascending"})
    expected = reference(14, name, state)
    assert all(torch.equal(exact[key], value) for key, value in expected.items())
    model = scheduler._model
    assert all(torch.equal(exact[key].bfloat16(), value) for key, value in model.state_dict().items())
    scheduler.close()


@pytest.mark.parametrize("state", ["drop", "keep"])
@pytest.mark.parametrize("projection", ["galore", "apollo", "fira"])
def test_projected_weights_are_those_of_masters_of_everything(projection: str, state: Any) -> None:
    options: dict[str, Any] = {
        "projection": projection,
        "projection_options": {"rank": 4, "update_gap": 2},
        "state": state,
    }
    exact, scheduler = run(14, **options)
    scheduler.close()
    whole = make_llama(dtype=torch.bfloat16).float()  # fp32 always, and run in bf16
    optimizer = OPTIMIZERS["adamw"](whole.parameters())
    scheduler = LayerScheduler(whole, optimizer, "cyclic", num_active=2, period=3, **options)
    for step in range(14):
        rounded = copy.deepcopy(whole).bfloat16()
        rounded(**make_batch(step)).loss.backward()
        for parameter, twin in zip(whole.parameters(), rounded.parameters(), strict=True):
            parameter.grad = twin.grad.float() if parameter.requires_grad else None
        optimizer.step()
        scheduler.step()
    assert all(torch.equal(exact[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("projection", [None, "galore", "apollo", "fira"])
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("stop", [4, 6])
def test_resume_is_exact(projection: str | None, state: StatePolicyName, stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"projection": projection, "projection_options": projection and {"rank": 4}}
    whole, _ = run(9, state=state, **options)
    resumed, _ = run(9, state=state, stop=stop, folder=tmp_path, **options)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


WITHOUT: dict[str, Any] = {"master_weights": False, "check": False}
LOW_RANK: dict[str, Any] = {"projection": "galore", "projection_options": {"rank": 4}}


@pytest.mark.parametrize("projection", ["galore", "apollo", "fira"])
@pytest.mark.parametrize(("state", "stop"), [("drop", 4), ("keep", 6), ("offload", 7)])
@pytest.mark.parametrize("rotate", [False, True])
def test_resume_without_masters_is_exact(
    projection: str, state: StatePolicyName, stop: int, rotate: bool, tmp_path: Path
) -> None:
    """What has a low rank is fp32 beside weights in bf16; torch alone would cast it to their type."""
    options: dict[str, Any] = {
        "projection": projection,
        "projection_options": {"rank": 4, "rotate_moments": rotate},
    }
    whole, first = run(9, state=state, **WITHOUT, **options)
    resumed, second = run(9, state=state, stop=stop, folder=tmp_path, **WITHOUT, **options)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert_same_state(first, second)


@pytest.mark.parametrize("name", WIDE_OPTIMIZERS)
def test_resume_without_masters_is_exact_where_the_optimizer_keeps_fp32(name: str, tmp_path: Path) -> None:
    whole, first = run(6, name, "keep", **WITHOUT)
    resumed, second = run(6, name, "keep", stop=4, folder=tmp_path, **WITHOUT)
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())
    assert_same_state(first, second)


def assert_same_state(first: LayerScheduler, second: LayerScheduler) -> None:
    for one, other in zip(first._model.parameters(), second._model.parameters(), strict=True):
        state, loaded = (s.optimizer.state.get(p, {}) for s, p in ((first, one), (second, other)))
        assert state.keys() == loaded.keys()
        for key, value in state.items():
            if torch.is_tensor(value):
                assert torch.equal(value, loaded[key]) and value.dtype == loaded[key].dtype, key
            else:
                assert value == loaded[key], key


def test_counts_are_loaded_to_where_an_optimizer_reads_them() -> None:
    """The meta device stands in for a GPU."""
    parameter, count = nn.Parameter(torch.empty(3, device="meta")), torch.tensor(1.0)
    for key, group, device in (
        ("step", {}, "cpu"),
        ("step", {"fused": True}, "meta"),
        ("mu_product", {"fused": True}, "cpu"),
        ("mu_product", {"capturable": True}, "meta"),
        ("layersample_projection_steps", {"capturable": True}, "cpu"),
    ):
        assert _placed(key, count, parameter, group).device.type == device, (key, group)


def test_low_rank_state_of_bf16_weights_in_a_distributed_checkpoint(tmp_path: Path) -> None:
    """It looks state up by its parameter's number, so there nothing may lie elsewhere."""
    _, first = run(4, **WITHOUT, **LOW_RANK)
    save_distributed(tmp_path / "saved", first._model, first.optimizer, first.state_dict())
    model = make_llama(dtype=torch.bfloat16)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loaded = load_distributed(tmp_path / "saved", model, optimizer, create_projection("galore", {"rank": 4}))
    second = LayerScheduler(
        model,
        optimizer,
        "cyclic",
        num_active=2,
        period=3,
        master_weights=False,
        state_dict=loaded,
        **LOW_RANK,
    )
    assert_same_state(first, second)


def test_small_updates_survive_that_bf16_loses() -> None:
    start = make_llama(dtype=torch.bfloat16).state_dict()
    kept, _ = run(12, "adamw-small-steps")
    lost, _ = run(12, "adamw-small-steps", master_weights=False, check=False)
    changed = [
        sum(int((values[name] != value.float()).sum()) for name, value in start.items() if "layers" in name)
        for values in (kept, lost)
    ]
    assert changed[0] > 2 * changed[1]


def test_memory_is_counted_by_kind() -> None:
    _, scheduler = run(4)  # one step into the second period
    model: Any = scheduler._model
    optimizer = scheduler.optimizer
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    use = measure_memory(model, optimizer)
    assert use.master_weights == 4 * trained
    assert use.master_remainders == pytest.approx(2 * 2 * layer, abs=100)  # and a few ties
    assert use.optimizer_state == pytest.approx(2 * 4 * trained, rel=0.01)  # fp32 moments, not bf16 ones
    scheduler.close()


@pytest.mark.parametrize("options", [{}, {**WITHOUT, **LOW_RANK}], ids=["masters", "low-rank"])
def test_an_optimizer_may_be_loaded_before_the_scheduler_is_made(options: dict[str, Any]) -> None:
    """As the Trainer does; torch alone would cast the state to bf16."""
    exact, first = run(4, **options)
    model = make_llama(dtype=torch.bfloat16)
    model.load_state_dict(first._model.state_dict())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    optimizer.load_state_dict(first.optimizer.state_dict())
    second = LayerScheduler(
        model, optimizer, "cyclic", num_active=2, period=3, state_dict=first.state_dict(), **options
    )
    assert all(torch.equal(exact[name], value) for name, value in second.fp32_state_dict().items())
    assert_same_state(first, second)
    first.close()
    second.close()


def test_an_edited_weight_wins_where_it_and_its_master_disagree() -> None:
    exact = every_kind_of_value()
    weight = exact.bfloat16()
    edited = weight.clone()
    edited[::3] = 0.5
    kept = split(exact, edited)
    expected = torch.where(weight == edited, exact, edited)
    assert torch.equal(combine(edited, kept), expected)
    assert kept[EXCEPTIONS].numel() < exact.numel() / 2**16 + 2**16  # an edit takes no room of its own
    # A frozen weight, whose remainders are kept: exact values of exceptions give way, others follow the weight.
    assert torch.equal(combine(edited, split(exact, weight)).bfloat16(), edited)


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.clamp_(-0.01, 0.01)


def through_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.01, 0.01)


def by_other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.clamp(-0.01, 0.01)


@pytest.mark.parametrize("edit", [in_place, through_data, by_other_data])
@pytest.mark.parametrize("steps", [4, 6], ids=["active", "frozen"])
def test_fp32_weights_are_those_that_someone_has_changed(edit: Any, steps: int) -> None:
    before, scheduler = run(steps, sampler_options={"order": "ascending"})
    model: Any = scheduler._model
    weight = model.model.layers[2 if steps == 4 else 0].mlp.up_proj.weight
    name = next(n for n, p in scheduler._model.named_parameters() if p is weight)
    clamped = weight.abs() > 0.01
    edit(weight)
    after = scheduler.fp32_state_dict()
    assert clamped.any() and not clamped.all()
    assert torch.equal(after[name].bfloat16(), weight)
    assert torch.equal(after[name][~clamped], before[name][~clamped])
    if steps == 4:
        assert torch.equal(after[name][clamped], weight[clamped].float())
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)


def test_a_step_goes_on_from_a_weight_that_was_changed_before_it() -> None:
    _, scheduler = run(4)
    model: Any = scheduler._model
    optimizer = scheduler.optimizer
    best = {name: value / 2 for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    model(**make_batch(4)).loss.backward()
    optimizer.step()  # of 1e-4
    for name, value in scheduler.fp32_state_dict().items():
        torch.testing.assert_close(value, best[name].float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("edit", [in_place, by_other_data])
def test_a_step_goes_on_from_an_edited_weight_however_it_was_written(edit: Any) -> None:
    _, scheduler = run(4, "adamw-small-steps", sampler_options={"order": "ascending"})
    model: Any = scheduler._model
    optimizer = scheduler.optimizer
    weight = model.model.layers[2].mlp.up_proj.weight
    edit(weight)
    model(**make_batch(4)).loss.backward()
    optimizer.step()  # of 1e-6
    assert float(scheduler.fp32_state_dict()["model.layers.2.mlp.up_proj.weight"].abs().max()) < 0.0101


def test_a_weight_that_is_changed_before_a_switch_stays_so() -> None:
    _, scheduler = run(5, sampler_options={"order": "ascending"})
    model: Any = scheduler._model
    optimizer = scheduler.optimizer
    weight = model.model.layers[2].mlp.up_proj.weight
    model(**make_batch(5)).loss.backward()
    optimizer.step()
    through_data(weight)
    edited = weight.detach().clone()
    scheduler.step()  # which freezes it
    exact = scheduler.fp32_state_dict()["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(exact.bfloat16(), edited)
    assert optimizer.state[weight].keys() == {REMAINDER}


def test_fp32_weights_have_no_masters() -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(model, optimizer, "lisa"):
        model(**make_batch()).loss.backward()
        optimizer.step()
    assert not any(MASTER in state for state in optimizer.state.values())
