"""Steps in the backward pass, against the same steps after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from layersample import Checkpoints, ConfigError, LayerSamplingCallback, LayerScheduler, StepInBackward
from layersample.projection.low_rank import NonFiniteGradientError
from layersample.versions import checkpoint_activations
from tests.helpers import make_batch, make_llama, weights_of

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def run(
    backward: StepInBackward | None,
    optimizer_name: str = "adamw",
    *,
    accumulation: int = 1,
    checkpointing: bool | None = None,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    clip: float | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], LayerScheduler]:
    model = make_llama(dtype=dtype, tie=tie)
    model.train()
    if checkpointing is not None:
        checkpoint_activations(model, {"use_reentrant": checkpointing})
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    scheduler = LayerScheduler(
        model,
        optimizer,
        "lisa",
        num_active=2,
        period=3,
        check=True,
        step_in_backward=backward or False,
        **options,
    )
    for step in range(7):
        for part in range(accumulation):
            (model(**make_batch(10 * step + part), use_cache=False).loss / accumulation).backward()
        if clip is not None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    nn.utils.clip_grad_norm_([parameter], clip)
        if backward is not None:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        schedule.step()
        scheduler.step()
        optimizer.zero_grad()
    weights = scheduler.fp32_state_dict()
    scheduler.close()
    return {name: value.clone() for name, value in weights.items()}, scheduler


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_ordinary_step_to_the_bit(name: str, state: Any) -> None:
    assert same(run(StepInBackward(), name, state=state)[0], run(None, name, state=state)[0])


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # frozen layers under checkpointing
@pytest.mark.parametrize(
    "options",
    [
        {"tie": True},
        {"embeddings": "sample"},
        {"checkpointing": True, "embeddings": "freeze"},
        {"checkpointing": False},
        {"dtype": torch.bfloat16},
        *({"projection": name, "projection_options": {"rank": 4}} for name in ("galore", "apollo", "fira")),
        {"projection": "galore", "projection_options": {"rank": 4}, "dtype": torch.bfloat16, "state": "keep"},
    ],
    ids=str,
)
def test_with_everything_else(options: dict[str, Any]) -> None:
    assert same(run(StepInBackward(), **options)[0], run(None, **options)[0])


def test_gradients_are_summed_up_first() -> None:
    backward = StepInBackward(accumulation=3)
    assert same(run(backward, accumulation=3)[0], run(None, accumulation=3)[0])


@pytest.mark.parametrize("projection", [None, "galore"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_epoch_may_end_within_a_window(clip: float | None, projection: str | None) -> None:
    """Steps behind passes 3, 4, 7 and 8 are those of the ordinary loop, and nothing is left over."""

    def train(backward: StepInBackward | None) -> dict[str, Tensor]:
        model = make_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scheduler = LayerScheduler(
            model,
            optimizer,
            "lisa",
            num_active=2,
            period=9,
            step_in_backward=backward or False,
            projection=projection,
            projection_options={"rank": 4} if projection else None,
        )
        for number in range(8):
            model(**make_batch(number), use_cache=False).loss.backward()
            if number % 4 in (2, 3):
                for parameter in model.parameters():
                    if backward is None and clip is not None and parameter.grad is not None:
                        nn.utils.clip_grad_norm_([parameter], clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        weights = {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}
        scheduler.close()
        return weights

    ours = train(StepInBackward(accumulation=3, max_norm=clip, clip_by="parameter"))
    naive = train(None)
    assert all(torch.allclose(ours[name], naive[name], atol=1e-7) for name in naive)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("projection", [None, "galore"])
def test_a_window_that_is_dropped_begins_anew(projection: str | None, to_none: bool) -> None:
    """zero_grad() after the second of three passes: the steps are those of the windows that were whole."""

    def train(backward: StepInBackward | None) -> dict[str, Tensor]:
        model = make_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        options: dict[str, Any] = {
            "projection": projection,
            "projection_options": {"rank": 4} if projection else None,
        }
        with LayerScheduler(
            model, optimizer, "cyclic", num_active=2, period=2, step_in_backward=backward, **options
        ) as scheduler:
            for window in range(4):
                passes = 2 if window == 1 else 3
                for number in range(passes):
                    model(**make_batch(10 * window + number), use_cache=False).loss.backward()
                if passes == 3:
                    optimizer.step()
                    scheduler.step()
                # Without a gradient a weight isn't stepped; after zero_grad(False) those that train have one.
                optimizer.zero_grad(set_to_none=to_none)
            return {name: value.clone() for name, value in scheduler.fp32_state_dict().items()}

    assert same(train(StepInBackward(accumulation=3)), train(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_by_parameter_is_clipping_each_by_itself(dtype: torch.dtype) -> None:
    ours, _ = run(StepInBackward(max_norm=0.05, clip_by="parameter"), "sgd-momentum", dtype=dtype)
    naive, _ = run(None, "sgd-momentum", clip=0.05, dtype=dtype)
    assert all(torch.allclose(ours[name], naive[name], atol=1e-7) for name in naive)
    assert not same(ours, run(None, "sgd-momentum", dtype=dtype)[0])


def test_the_running_norm_is_that_of_the_step_before() -> None:
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = StepInBackward(max_norm=0.5)
    scheduler = LayerScheduler(model, optimizer, "full", num_active=1, step_in_backward=options)
    assert scheduler.gradient_norm is None
    norms, moved = [], []
    for step in range(3):
        reference = make_llama()
        reference.load_state_dict(model.state_dict())
        reference(**make_batch(step)).loss.backward()
        norms.append(
            float(nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None]))
        )
        before = [p.detach().clone() for p in model.parameters()]
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.gradient_norm == pytest.approx(norms[-1], rel=1e-5)
        moved.append(
            float(
                nn.utils.get_total_norm(
                    [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
                )
            )
        )
    assert moved[0] == pytest.approx(1e-3 * norms[0], rel=1e-3)  # nothing is known yet
    for step in (1, 2):
        assert moved[step] == pytest.approx(1e-3 * norms[step] * 0.5 / norms[step - 1], rel=1e-2)


def test_gradients_never_stand_side_by_side() -> None:
    _, scheduler = run(StepInBackward())
    model = make_llama()
    assert scheduler.largest_gradient == max(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_the_trainer(tmp_path: Path, accumulate: int) -> None:
    weights = []
    for backward in (None, StepInBackward()):
        rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(12)]
        args = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0, report_to="none", use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=make_llama(), args=args, train_dataset=Dataset.from_list(rows))
        LayerSamplingCallback("lisa", period=2, step_in_backward=backward).attach(trainer)
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert same(*weights)


def test_the_trainer_s_clipping_is_refused(tmp_path: Path) -> None:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(2)]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    trainer = Trainer(model=make_llama(), args=args, train_dataset=Dataset.from_list(rows))
    with pytest.raises(ConfigError, match="max_grad_norm to 0"):
        LayerSamplingCallback("lisa", step_in_backward=StepInBackward()).attach(trainer)


def test_the_running_norm_survives_a_checkpoint(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler, Checkpoints]:
        model = make_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        backward = StepInBackward(max_norm=0.1)
        scheduler = LayerScheduler(model, optimizer, "lisa", period=3, step_in_backward=backward)
        kept: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        return model, optimizer, scheduler, Checkpoints(tmp_path, kept)

    def train(steps: range, built: Any) -> dict[str, Tensor]:
        model, optimizer, scheduler, checkpoints = built
        for step in steps:
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            if step == 3:
                checkpoints.save(step + 1)
        return dict(model.state_dict())

    whole = train(range(8), build())
    resumed = build()
    assert same(whole, train(range(resumed[3].load_last(), 8), resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "accumulation must be greater than or equal to 1, but got accumulation=0"),
        ({"accumulation": 1.5}, "accumulation must be a valid integer"),
        ({"accumulation": "2"}, "accumulation must be a whole number, not text"),
        ({"accumulation": True}, "accumulation must not be true or false"),
        ({"max_norm": 0.0}, "max_norm must be greater than 0"),
        ({"max_norm": float("inf")}, "max_norm must be a finite number"),
        ({"max_norm": "1"}, "max_norm must be a number, not text"),
        ({"clip_by": "all"}, "clip_by must be 'running' or 'parameter', but got clip_by='all'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepInBackward(**options)


def test_a_gradient_that_is_no_number_says_how_many_weights_have_changed() -> None:
    model = make_llama(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    galore: dict[str, Any] = {"projection": "galore", "projection_options": {"rank": 4}}
    scheduler = LayerScheduler(
        model, optimizer, "full", num_active=2, step_in_backward=StepInBackward(), **galore
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.model.layers[0].mlp.register_full_backward_hook(
        lambda module, inputs, outputs: tuple(g * float("nan") for g in inputs)
    )
    with pytest.raises(NonFiniteGradientError, match=r"updated in this step already") as raised:
        model(**make_batch()).loss.backward()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and f"{len(changed)} weights that come later" in str(raised.value)
    assert "Nothing has changed" not in str(raised.value)
    scheduler.close(check=False)
