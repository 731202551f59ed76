"""Checkpoints: whole or not there, refused where they can't be used, and exact however a run was killed."""

from __future__ import annotations

import itertools
import os
import pkgutil
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from layersample import (
    Checkpoints,
    ConfigError,
    LayerSamplingCallback,
    LayerScheduler,
    list_projections,
    list_samplers,
)
from layersample.checkpoints.seal import CheckpointError, check, find_last
from tests.helpers import make_batch, make_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")

STEPS, PERIOD, SAVE = 8, 3, 2
KILLS = ("in a step", "at a switch", "while saving", "before the rename")
OPTIONS: dict[str, dict[str, Any]] = {
    "lora_norm": {"probe_steps": 1, "probe_rank": 2},
    "owlore": {"metric": "hill"},
    "prior": {"weights": "increase"},
}


def cells() -> list[tuple[str, str, str | None, str, str]]:
    """Every sampler, state policy, projection and precision beside every kind of kill, each pair at least once."""
    samplers = [name for name, cls in list_samplers().items() if cls.__module__.startswith("layersample_")]
    projections = [
        None,
        *(n for n, c in list_projections().items() if c.__module__.startswith("layersample_")),
    ]
    policies = itertools.cycle(("drop", "keep", "offload"))
    chosen = []
    for i, sampler in enumerate(samplers):
        for j, kill in enumerate(KILLS):
            projection = projections[(i + j) % len(projections)]
            if list_samplers()[sampler].needs_projection:
                projection = "galore"
            chosen.append((sampler, next(policies), projection, ("fp32", "bf16")[(i + j // 2) % 2], kill))
    return chosen


def arguments(sampler: str, state: str, projection: str | None) -> dict[str, Any]:
    return {
        "num_active": 2,
        "period": PERIOD,
        "seed": 1,
        "state": state,
        "sampler_options": OPTIONS.get(sampler),
        "projection": projection,
        "projection_options": projection and {"rank": 4, "update_gap": 2},
    }


def build(precision: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return make_llama(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)


def run_plain(
    folder: Path, sampler: str, state: str, projection: str | None, precision: str
) -> dict[str, Tensor]:
    model = build(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    scheduler = LayerScheduler(
        model,
        optimizer,
        sampler,
        batches=[make_batch(90)],
        check=True,
        **arguments(sampler, state, projection),
    )
    kept: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "scheduler": scheduler,
    }
    checkpoints = Checkpoints(folder, kept)
    for step in range(checkpoints.load_last(), STEPS):
        batch = make_batch(random.randrange(100) + int(torch.randint(100, ())))  # both generators matter
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        scheduler.step(loss=loss.detach())  # some samplers learn from it
        optimizer.zero_grad()
        if (step + 1) % SAVE == 0:
            checkpoints.save(step + 1)
    return scheduler.fp32_state_dict()


def trainer_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVE,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "logging_steps": 1,  # some samplers learn from the loss
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def train(
    trainer: Trainer, folder: Path, sampler: str, state: str, projection: str | None
) -> dict[str, Tensor]:
    callback = LayerSamplingCallback(sampler, check=True, **arguments(sampler, state, projection))
    callback.attach(trainer)
    last = find_last(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    assert callback.scheduler is not None
    return callback.scheduler.fp32_state_dict()


def run_trainer(
    folder: Path, sampler: str, state: str, projection: str | None, precision: str
) -> dict[str, Tensor]:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(12)]
    options = TrainingArguments(**trainer_arguments(folder))
    trainer = Trainer(model=build(precision), args=options, train_dataset=Dataset.from_list(rows))
    return train(trainer, folder, sampler, state, projection)


def run_sft(
    folder: Path, sampler: str, state: str, projection: str | None, precision: str, tokenizer: Path
) -> dict[str, Tensor]:
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(12)]
    trainer = SFTTrainer(
        model=build(precision),
        args=SFTConfig(**trainer_arguments(folder), max_length=16, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    return train(trainer, folder, sampler, state, projection)


@contextmanager
def dies(kill: str) -> Iterator[None]:
    """Kill this process at a moment of a run, hard."""
    count = 0

    def die(at: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    target, at = {
        "in a step": ("torch.optim.adamw.AdamW._init_group", 5),
        "at a switch": ("layersample.scheduling.switch.Switch.place_state", 3),
        "while saving": ("torch.save", 6),
        "before the rename": ("os.fsync", 12),
    }[kill]
    with mock.patch(target, die(at, pkgutil.resolve_name(target))):
        yield


def killed(kill: str, run: Callable[[], Any]) -> None:
    """Run in a copy of this process that is killed."""
    child = os.fork()
    if child == 0:
        try:
            with dies(kill):
                run()
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    ("loop", "sampler", "state", "projection", "precision", "kill"),
    [
        (loop, *cell)
        for loop, every in (("plain", 1), ("trainer", 2), ("sft", 3))
        for cell in cells()[::every]
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    loop: str,
    sampler: str,
    state: str,
    projection: str | None,
    precision: str,
    kill: str,
    tmp_path: Path,
    tiny_model: Path,
) -> None:
    def run(folder: Path) -> dict[str, Tensor]:
        random.seed(0)
        torch.manual_seed(0)
        more = (tiny_model,) if loop == "sft" else ()
        loops: dict[str, Callable[..., dict[str, Tensor]]]
        loops = {"plain": run_plain, "trainer": run_trainer, "sft": run_sft}
        return loops[loop](folder, sampler, state, projection, precision, *more)

    killed(kill, lambda: run(tmp_path / "killed"))
    for checkpoint in (tmp_path / "killed").glob("checkpoint-*"):
        check(checkpoint)  # none is there in part
    resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not list((tmp_path / "killed").glob(".saving-*"))


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, {"model": nn.Linear(2, 2)})
    checkpoints.save(5)
    checkpoints.save(10)
    return checkpoints


def test_the_last_ones_are_kept(two: Checkpoints) -> None:
    two.save(15)
    assert sorted(p.name for p in two.folder.iterdir()) == ["checkpoint-10", "checkpoint-15"]
    assert two.load_last() == 15


def test_a_new_run_begins_at_zero(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", {"model": nn.Linear(2, 2)}).load_last() == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p / "model.pt", 100), r"its file model.pt is damaged: it must have \d+ bytes, but has 100"),
        (lambda p: (p / "model.pt").unlink(), "its file model.pt is missing"),
        (lambda p: (p / "layersample.json").unlink(), "wasn't saved by layersample"),
        (lambda p: (p / "layersample.json").write_text("{"), "layersample.json is damaged"),
        (lambda p: (p / "layersample.json").write_text('{"version": 9, "files": {}}'), "it is of version 9"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_says_so_and_the_one_before_is_offered(
    two: Checkpoints, damage: Callable[[Path], Any], message: str
) -> None:
    damage(two.folder / "checkpoint-10")
    with pytest.raises(CheckpointError, match=message + ".*last whole checkpoint is .*checkpoint-5"):
        two.load_last()
    assert two.load(two.folder / "checkpoint-5") == 5


def test_every_flipped_bit_is_found_before_anything_is_loaded(two: Checkpoints) -> None:
    last = two.folder / "checkpoint-10"
    for file in sorted(last.iterdir()):
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match="damaged.*last whole checkpoint is .*checkpoint-5"):
                two.load_last()
        file.write_bytes(whole)
    assert two.load_last() == 10
    data = bytearray((last / "model.pt").read_bytes())
    weight = two._objects["model"].state_dict()["weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1  # torch itself would load it
    (last / "model.pt").write_bytes(data)
    assert Checkpoints(two.folder, two._objects, verify=False).load_last() == 10


def test_a_run_that_goes_back_goes_on_from_there(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, {"model": model}, keep=3)
    for step in (50, 100):
        model.weight.data.fill_(step)
        checkpoints.save(step)
    assert checkpoints.load(tmp_path / "checkpoint-50") == 50 and model.weight[0, 0] == 50
    checkpoints.keep = 1
    checkpoints.save(60)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-60"]
    checkpoints.keep = 3
    checkpoints.save(100)
    checkpoints.load(tmp_path / "checkpoint-60")
    checkpoints.save(70)
    assert Checkpoints(tmp_path, {"model": model}).load_last() == 70


def test_a_second_run_in_the_folder_is_refused_before_it_removes_anything(tmp_path: Path) -> None:
    first, second = (Checkpoints(tmp_path, {"model": nn.Linear(2, 2)}, keep=1) for _ in range(2))
    assert first.load_last() == second.load_last() == 0
    first.save(5)
    with pytest.raises(ConfigError, match="another one has saved .*checkpoint-5 since"):
        second.save(3)
    first.save(10)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]
    assert second.load_last() == 10
    second.save(15)


@pytest.mark.parametrize("name", ["random", "Random", "a/b", "../a", "", ".a", "a b"])
def test_names_that_aren_t_a_file_s_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name of what is kept must be"):
        Checkpoints(tmp_path, {name: nn.Linear(1, 1)})


def test_names_that_differ_in_capital_letters_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stand once.*got 'Model'"):
        Checkpoints(tmp_path, {"model": nn.Linear(1, 1), "Model": nn.Linear(1, 1)})


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["order"]


@pytest.mark.parametrize(
    "value",
    [
        numpy.arange(4),
        numpy.ones((2, 3), dtype=numpy.float16, order="F"),
        numpy.array(["a", "bc"]),
        numpy.float32(1.5),
        numpy.bool_(True),
        numpy.random.RandomState(0).get_state(),  # noqa: NPY002
        numpy.random.PCG64(0).state,
    ],
    ids=repr,
)
def test_arrays_come_back(value: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"loader": (loader := Holds(value))})
    checkpoints.save(1)
    loader.value = None
    assert checkpoints.load_last() == 1
    assert type(loader.value) is type(value) and repr(loader.value) == repr(value)


@pytest.mark.parametrize("value", [numpy.array([None]), Path("x"), lambda: 0, Holds(1)])
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(two: Checkpoints, value: Any) -> None:
    checkpoints = Checkpoints(two.folder, {"model": nn.Linear(2, 2), "loader": Holds(value)}, keep=1)
    with pytest.raises(ConfigError, match="the state of 'loader'"):
        checkpoints.save(15)
    assert sorted(p.name for p in two.folder.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_objects_with_dots_in_their_names_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": Holds(1), "model.ema": Holds([2.5])})
    checkpoints.save(0)
    checkpoints._objects["model.ema"].value = None  # type: ignore[attr-defined]
    assert checkpoints.load_last() == 0 and checkpoints._objects["model.ema"].value == [2.5]  # type: ignore[attr-defined]


def test_other_objects_are_refused(two: Checkpoints) -> None:
    other = Checkpoints(two.folder, {"model": nn.Linear(2, 2), "optimizer": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="must hold model, optimizer, but holds model"):
        other.load_last()


def test_a_missing_checkpoint_is_named(two: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        two.load(two.folder / "checkpoint-7")


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep must be greater than or equal to 1"):
        Checkpoints(tmp_path, {}, keep=0)
    with pytest.raises(ConfigError, match="'step' .int. hasn't"):
        Checkpoints(tmp_path, {"step": 3})  # type: ignore[dict-item]


def test_changes_are_refused_with_both_values_or_allowed(tmp_path: Path) -> None:
    def resume(**changes: Any) -> LayerScheduler:
        model = build("fp32")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {**arguments("lisa", "keep", "galore"), "sampler": "lisa", **changes}
        scheduler = LayerScheduler(model, optimizer, **options)
        kept: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        checkpoints = Checkpoints(tmp_path, kept)
        for step in range(checkpoints.load_last(), checkpoints.load_last() + 4):
            model(**make_batch(step)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        checkpoints.save(step + 1)
        return scheduler

    resume()
    for key, value, message in (
        ("num_active", 1, "it was 2, but is 1 now"),
        ("sampler", "cyclic", "it was 'lisa', but is 'cyclic' now"),
        ("seed", 7, "it was 1, but is 7 now"),
        ("period", 4, "it was 3, but is 4 now"),
        ("projection", None, "it was 'galore', but is None now"),
        ("projection_options", {"rank": 2}, "'rank': 2"),
    ):
        changes = {key: value, **({"projection_options": None} if key == "projection" else {})}
        with pytest.raises(ConfigError, match=f"with the .*{message}"):
            resume(**changes)
        assert resume(**changes, allow_changes=True).steps >= 4
        resume(allow_changes=True)  # and back again


@pytest.mark.parametrize(
    "step", [1.0, "1", None, True, -1, float("nan"), 10**30, numpy.float64(1), torch.tensor(1.5)]
)
def test_a_step_that_is_no_number_of_steps_is_refused(step: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": Holds(1)})
    with pytest.raises(ConfigError, match=r"^step must .*but got step="):
        checkpoints.save(step)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [3, numpy.int64(3), torch.tensor(3)], ids=["int", "numpy", "torch"])
def test_numbers_of_other_libraries_are_numbers(step: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": Holds(1)}, keep=step)
    assert type(checkpoints.keep) is int
    assert checkpoints.save(step).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "2"}, "keep must be a whole number, not text"),
        ({"keep": 2.5}, "keep must be a valid integer"),
        ({"keep": True}, "keep must not be true or false"),
        ({"keep": 0}, "keep must be greater than or equal to 1"),
        ({"verify": "no"}, "verify must be true or false, not text"),
        ({"verify": 0}, "verify must be true or false"),
        ({"folder": None}, "folder must be a path"),
        ({"folder": ""}, "folder must be a path"),
        ({"objects": [Holds(1)]}, "must be a mapping of names to objects, but got a list"),
        ({"objects": {1: Holds(1)}}, "but got 1"),
    ],
)
def test_arguments_of_another_type_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpoints(**{"folder": tmp_path, "objects": {"model": Holds(1)}, **arguments})
