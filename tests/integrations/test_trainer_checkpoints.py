"""Checkpoints of a Trainer, and what is begun anew or continued by each call of train()."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import Trainer, TrainerCallback

from layersample import ConfigError, LayerSampler, LayerSamplingCallback, SamplingContext
from layersample.checkpoints.seal import CheckpointError, check, find_last, last_number, seal
from tests.helpers import OLD_TRAINER, make_llama, weights_of
from tests.integrations.test_transformers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
CYCLE = [(0,), (0,), (1,), (1,), (2,), (2,)]


class See(TrainerCallback):
    def __init__(self, callback: LayerSamplingCallback) -> None:
        self.callback = callback
        self.active: list[tuple[int, ...]] = []

    def on_step_end(self, *args: Any, **more: Any) -> None:
        assert self.callback.scheduler is not None
        self.active.append(self.callback.scheduler.active)

    def take(self) -> list[tuple[int, ...]]:
        taken, self.active = self.active, []
        return taken


def attached(
    folder: Path, callback: LayerSamplingCallback | None = None, **arguments: Any
) -> tuple[Trainer, See]:
    callback = callback or LayerSamplingCallback("cyclic", num_active=1, period=2, check=True)
    trainer = make_trainer(folder, None, **{"max_steps": 6, **arguments})
    callback.attach(trainer)
    seen = See(callback)
    trainer.add_callback(seen)
    return trainer, seen


class Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("attach", [True, False])
def test_each_train_begins_anew_unless_it_resumes(tmp_path: Path, attach: bool) -> None:
    callback = LayerSamplingCallback("cyclic", num_active=1, period=2)
    trainer, seen = attached(tmp_path, callback if attach else None, **SAVING)
    if not attach:
        trainer = make_trainer(tmp_path, callback, **SAVING)
        seen = See(callback)
        trainer.add_callback(seen)
    trainer.train()
    assert seen.take() == CYCLE
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen.take() == CYCLE[4:]
    trainer.train()
    assert seen.take() == CYCLE
    trainer.args.max_steps = 8
    trainer.train(resume_from_checkpoint=True)
    assert seen.take() == [(3,), (3,)]


def test_a_retry_after_an_exception_begins_anew_or_resumes(tmp_path: Path) -> None:
    trainer, seen = attached(tmp_path, **SAVING)
    fails = Fails()
    trainer.add_callback(fails)
    with pytest.raises(RuntimeError):
        trainer.train()
    trainer.remove_callback(fails)
    assert seen.take() == CYCLE[:3]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen.take() == CYCLE[2:]
    trainer.add_callback(fails)
    with pytest.raises(RuntimeError):
        trainer.train()
    trainer.remove_callback(fails)
    seen.take()
    trainer.train()
    assert seen.take() == CYCLE


@pytest.mark.parametrize("projection", [None, "galore"])
def test_a_run_resumed_after_an_exception_ends_as_one_without(tmp_path: Path, projection: str | None) -> None:
    """In the same process: the checkpoint is loaded while the interrupted run's scheduler is on the optimizer."""

    def callback() -> LayerSamplingCallback:
        options = {"rank": 4} if projection else None
        return LayerSamplingCallback(
            "lisa", period=2, state="keep", projection=projection, projection_options=options
        )

    whole, _ = attached(tmp_path / "whole", callback(), **SAVING)
    whole.train()
    trainer, _ = attached(tmp_path / "part", callback(), **SAVING)
    fails = Fails()
    trainer.add_callback(fails)
    with pytest.raises(RuntimeError):
        trainer.train()
    trainer.remove_callback(fails)
    trainer.train(resume_from_checkpoint=True)
    first, second = weights_of(whole.model), weights_of(trainer.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_callback_serves_one_trainer_after_another(tmp_path: Path) -> None:
    callback = LayerSamplingCallback("cyclic", num_active=1, period=2)
    first, seen = attached(tmp_path / "first", callback)
    second, other = attached(tmp_path / "second", callback)
    for trainer, looks in (
        (first, seen),
        (second, other),
        (first, seen),
    ):  # the first again, though it isn't the last
        before = weights_of(trainer.model)
        trainer.train()
        assert looks.take() == CYCLE
        after = weights_of(trainer.model)
        assert any(not torch.equal(before[name], after[name]) for name in before if ".layers.2." in name)


def test_a_callback_in_two_trainings_at_a_time_is_refused(tmp_path: Path) -> None:
    callback = LayerSamplingCallback("cyclic", num_active=1, period=2)
    inner, _ = attached(tmp_path / "inner", callback)
    outer, _ = attached(tmp_path / "outer", callback)

    class Nested(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            inner.train()

    outer.add_callback(Nested())
    with pytest.raises(ConfigError, match="in one training at a time"):
        outer.train()


class Remembers(LayerSampler):
    """A sampler with a state of its own, which depends on all that it has drawn."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        self.drawn.append(len(self.drawn) % 3)
        return (self.drawn[-1],)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Any) -> None:
        self.drawn = list(state["drawn"])


def test_a_sampler_that_is_an_object_begins_each_run_as_it_was_given(tmp_path: Path) -> None:
    callback = LayerSamplingCallback(Remembers(), num_active=1, period=4)
    trainer, seen = attached(tmp_path, callback, **SAVING)
    for _ in range(2):
        trainer.train()
        assert seen.take() == [(0,)] * 4 + [(1,)] * 2
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen.take() == [(1,)] * 2


class Trial:
    """As much of optuna's as the Trainer uses, so that the package isn't needed."""

    number = 7
    params: dict[str, Any] = {}


def test_trials_of_a_search_begin_anew_and_their_checkpoints_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.trainer_utils import HPSearchBackend

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer, seen = attached(tmp_path, **SAVING)
    trainer.model_init = lambda: make_llama()
    trainer.hp_search_backend = HPSearchBackend.OPTUNA  # type: ignore[assignment]
    trainer.hp_space = lambda trial: {}
    for _ in range(2):
        trainer.train(trial=Trial())  # type: ignore[arg-type]
        assert seen.take() == CYCLE
    checkpoint = tmp_path / "run-7" / "checkpoint-4"
    check(checkpoint)
    assert not list(tmp_path.rglob(".saving-*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-7"]
    other, looks = attached(tmp_path / "other", **SAVING)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert looks.take() == CYCLE[4:]


def test_what_is_pushed_to_the_hub_is_whole_and_in_its_place(tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, **SAVING)
    pushed: list[str] = []

    def push(checkpoint_folder: str) -> None:
        check(Path(checkpoint_folder))
        assert trainer.args.output_dir == str(tmp_path)
        pushed.append(checkpoint_folder)

    trainer._push_from_checkpoint = push  # type: ignore[method-assign]
    save = trainer._save_checkpoint

    def save_and_push(model: Any, trial: Any) -> None:
        trainer.args.push_to_hub = True  # not before: it would log in
        save(model, trial)
        trainer.args.push_to_hub = False

    trainer._save_checkpoint = save_and_push  # type: ignore[method-assign]
    trainer.train()
    assert pushed == [str(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)]


@OLD_TRAINER
@pytest.mark.parametrize("steps", [4, 6])
def test_a_run_resumed_at_its_end_only_finishes(tmp_path: Path, steps: int) -> None:
    trainer, _ = attached(tmp_path, **{**SAVING, "max_steps": steps})
    trainer.train()
    ended = weights_of(trainer.model)
    for _ in range(2):
        again, seen = attached(tmp_path, **{**SAVING, "max_steps": steps})
        again.train(resume_from_checkpoint=True)
        assert seen.active == [] and again.state.global_step == steps
        assert all(torch.equal(ended[name], weight) for name, weight in weights_of(again.model).items())


def test_a_callback_that_isn_t_attached_refuses_to_train_past_the_end(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return make_trainer(tmp_path, LayerSamplingCallback("lisa"), **SAVING)

    trainer().train()
    with pytest.raises(ConfigError, match="has done 6 of 6, and the Trainer would do one more: use attach"):
        trainer().train(resume_from_checkpoint=True)


def test_an_old_trainer_refuses_to_train_past_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers 5.3 nothing can be put around an epoch."""
    attached(tmp_path, **SAVING)[0].train()
    again, _ = attached(tmp_path, **SAVING)
    if hasattr(again, "_run_epoch"):
        del again._run_epoch  # what attach has put there
    with pytest.raises(ConfigError, match="has done 6 of 6, .* with transformers 5.3 or later"):
        again.train(resume_from_checkpoint=True)


def test_an_old_trainer_may_not_load_the_best_weights_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers 5.3 it does so while layers are sampled."""
    trainer, _ = attached(tmp_path, **SAVING)
    trainer.args.load_best_model_at_end = True
    monkeypatch.delattr(Trainer, "_run_epoch", raising=False)
    with pytest.raises(
        ConfigError, match="load_best_model_at_end must be False with transformers before 5.3"
    ):
        trainer.train()


def test_the_trainer_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    attached(tmp_path, **SAVING)[0].train()
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match="optimizer.pt is damaged.*last whole checkpoint is .*checkpoint-4"
    ):
        attached(tmp_path, **SAVING)[0].train(resume_from_checkpoint=True)
    os.truncate(path, 64)
    trainer = make_trainer(tmp_path, None, **SAVING)
    LayerSamplingCallback("lisa").attach(trainer, verify=False)
    with pytest.raises(CheckpointError, match="optimizer.pt is damaged: it must have"):
        trainer.train(resume_from_checkpoint=True)


def test_an_edited_trainer_state_is_taken_where_changes_are_allowed(tmp_path: Path) -> None:
    attached(tmp_path, **SAVING)[0].train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_steps": 3}))
    with pytest.raises(CheckpointError, match="trainer_state.json is damaged or edited.*allow_changes=True"):
        attached(tmp_path, **SAVING)[0].train(resume_from_checkpoint=str(path.parent))
    callback = LayerSamplingCallback("cyclic", num_active=1, period=2, allow_changes=True)
    trainer, seen = attached(tmp_path, callback, **SAVING)
    trainer.train(resume_from_checkpoint=str(path.parent))
    assert seen.take() == CYCLE[4:]


def test_a_checkpoint_of_the_model_alone_is_no_run_to_resume(tmp_path: Path) -> None:
    attached(tmp_path, **SAVING, save_only_model=True)[0].train()
    with pytest.raises(CheckpointError, match="holds the model alone, as save_only_model asks for"):
        attached(tmp_path, **SAVING)[0].train(resume_from_checkpoint=True)


def test_a_schedule_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    trainer, _ = attached(tmp_path, **SAVING)
    create = trainer.create_scheduler

    def create_with_numpy(*args: Any, **more: Any) -> Any:
        schedule: Any = create(*args, **more)
        schedule.history = numpy.zeros(3)
        return schedule

    trainer.create_scheduler = create_with_numpy  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="the Trainer's scheduler.pt holds other objects"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint*")) and not list(tmp_path.glob(".saving*"))


def test_a_run_that_goes_back_keeps_what_it_saves_then(tmp_path: Path, caplog: Any) -> None:
    attached(tmp_path, **SAVING)[0].train()
    for path in tmp_path.glob("checkpoint-*"):
        os.utime(path, (2e9, 2e9))  # a clock that is put back
    again, seen = attached(tmp_path, **SAVING, save_total_limit=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen.take() == CYCLE[2:]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-6"] and last_number(tmp_path) == 5
    assert "checkpoint-2, though" in caplog.text and "was saved later" in caplog.text


@OLD_TRAINER
def test_the_best_checkpoint_is_kept_and_found(tmp_path: Path) -> None:
    best_of = {
        **SAVING,
        "learning_rate": 1.0,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    callback = LayerSamplingCallback(
        "lisa", num_active=1, period=2, check=True
    )  # which the best weights don't trip
    trainer = make_trainer(
        tmp_path, None, **{**best_of, "eval_strategy": "no", "load_best_model_at_end": False}
    )
    trainer.eval_dataset = trainer.train_dataset
    for name in ("eval_strategy", "load_best_model_at_end"):
        setattr(trainer.args, name, best_of[name])
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = Path(trainer.state.best_model_checkpoint)
    assert best.is_dir() and best.parent == tmp_path
    last = find_last(tmp_path)
    assert last is not None
    saved = json.loads((last / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)
    check(best)
    seal(best)  # once more is the same
    check(best)
