"""Options for TRL's SFTConfig that a run would ignore."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from layersample import ConfigError
from layersample.config import make_config
from layersample.training.arguments import training_arguments
from layersample.training.finetune import _check, finetune
from layersample.training.idle_options import _NEEDS
from layersample.training.ranks import join_ranks
from layersample.training.trainer_options import check_trainer_options

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")

FIELDS = {field.name for field in dataclasses.fields(SFTConfig)}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 3}
BEST = {"load_best_model_at_end": True, **BY_STEPS}
SORTED = {"train_sampling_strategy": "group_by_length"}


def make(trainer: dict[str, Any], **options: Any) -> SFTConfig:
    return training_arguments(make_config(("test", {"steps": 6, "trainer": trainer, **options})), Path("x"))


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        # What an evaluation, a checkpoint or another option must be there for.
        ({"eval_steps": 3}, {}, "eval_steps needs eval_strategy=steps"),
        ({"eval_steps": 3, "eval_strategy": "epoch"}, {}, "eval_steps needs eval_strategy=steps"),
        ({"eval_delay": 3}, {}, "eval_delay needs eval_strategy"),
        ({"save_total_limit": 3}, {}, r"save_total_limit needs save_steps \(--save-steps\)"),
        ({"metric_for_best_model": "loss"}, {}, "metric_for_best_model needs eval_strategy.*save_steps"),
        ({"metric_for_best_model": "loss", **BY_STEPS}, {}, "metric_for_best_model needs .*save_steps"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, "needs gradient_checkpointing"),
        ({"packing_strategy": "wrapped"}, {}, "packing_strategy needs packing=true"),
        ({"liger_kernel_config": {"rope": True}}, {}, "liger_kernel_config needs use_liger_kernel"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"schedule": "constant"}, "needs a schedule that takes"),
        ({"run_name": "mine"}, {}, "run_name needs report_to"),
        # The best model.
        ({"load_best_model_at_end": True}, {}, "needs a checkpoint of each model that is evaluated"),
        (BEST, {}, "but got eval_strategy='steps', eval_steps=3 and save_steps None"),
        (BEST, {"save_steps": 6}, "eval_steps=3 and save_steps 6"),
        ({**BEST, "metric_for_best_model": "accuracy"}, {"save_steps": 3}, "must be loss, .*'accuracy'"),
        ({**BEST, "greater_is_better": True}, {"save_steps": 3}, "the best loss is the lowest"),
        # The optimizer.
        (
            {"optim_target_modules": "all-linear"},
            {},
            "optim_target_modules must be left out with optim=adamw",
        ),
        (
            {"optim_target_modules": ["q"], "optim": "adafactor"},
            {},
            "with optim=adafactor, which doesn't read",
        ),
        ({"optim_args": "a=1"}, {}, "optim_args must hold options that optim=adamw.* but got 'a=1'"),
        ({"optim_args": "momentum=.9,nesterof=true", "optim": "sgd"}, {}, "but got 'nesterof=true'"),
        ({"adam_beta1": 0.8, "optim": "sgd"}, {}, "adam_beta1 must be left out with optim=sgd"),
        ({"adam_epsilon": 1e-6, "optim": "adafactor"}, {}, "adam_epsilon must be left out"),
        # A run that is too short, and data that are streamed.
        ({**BY_STEPS, "eval_steps": 7}, {}, "eval_steps must be at most the 6 steps"),
        ({**BY_STEPS, "eval_delay": 9}, {}, "eval_delay must be at most the 6 steps"),
        ({"eval_strategy": "epoch"}, {"stream": True}, "must be steps with stream"),
        ({"data_seed": 3}, {"stream": True}, "data_seed orders data that are loaded at once"),
    ],
)
def test_what_a_run_would_ignore_is_refused(
    trainer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^trainer: .*{message}"):
        make(trainer, **options)


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ({"eval_strategy": "no", "load_best_model_at_end": False, "adam_beta1": 0.9, "optim": "sgd"}, {}),
        ({**BEST, "metric_for_best_model": "eval_loss"}, {"save_steps": 3}),
        ({"save_total_limit": 1}, {"save_steps": 3}),
        ({"optim": "sgd", "optim_args": "momentum=0.0, nesterov=false"}, {}),
        ({"optim": "adagrad", "optim_args": "eps=1e-10"}, {}),
        ({"adam_beta2": 0.95, "data_seed": 3}, {}),
        ({**BY_STEPS, "eval_steps": 7}, {"epochs": 2}),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_checkpointing": True}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"schedule": "cosine"}),
        ({"packing": True, "packing_strategy": "wrapped"}, {}),
    ],
)
def test_what_has_an_effect_or_asks_for_nothing_is_taken(
    trainer: dict[str, Any], options: dict[str, Any]
) -> None:
    made = make(trainer, **options)
    assert all(getattr(made, name) == value for name, value in trainer.items() if name != "optim")


@pytest.mark.skipif("train_sampling_strategy" not in FIELDS, reason="another option before")
def test_an_order_by_length_is_of_data_that_are_loaded() -> None:
    with pytest.raises(ConfigError, match="length_column_name needs train_sampling_strategy"):
        make({"length_column_name": "count"})
    assert make({**SORTED, "length_column_name": "count"}).length_column_name == "count"
    with pytest.raises(ConfigError, match="train_sampling_strategy orders data"):
        make(SORTED, stream=True)


def test_every_option_with_a_need_is_one_of_sftconfig() -> None:
    renamed = {"activation_checkpointing_kwargs", "length_column_name", "project", "liger_kernel_config"}
    assert set(_NEEDS) - FIELDS <= renamed


@pytest.mark.parametrize(
    ("options", "says"),
    [({"save_steps": 7}, True), ({"save_steps": 6}, False), ({"save_steps": 7, "epochs": 2}, False)],
)
def test_a_run_that_saves_no_checkpoint_says_so(options: dict[str, Any], says: bool) -> None:
    said: list[str] = []
    _check(make_config(("test", {"steps": 6, **options})), join_ranks(), said.append)
    assert any(line.startswith("No checkpoint is saved, because save_steps 7") for line in said) == says


def test_a_token_isn_t_shown() -> None:
    with pytest.raises(ConfigError, match="hub_token must be left out.*HF_TOKEN") as raised:
        check_trainer_options({"hub_token": "hf_secret"})
    assert "secret" not in str(raised.value)


def test_the_loss_of_a_run_is_that_of_the_best_model_which_it_saves(
    short_run: dict[str, Any], tmp_path: Path
) -> None:
    # A model that learns digits gets worse at letters with every step, on any machine: the first one is the best.
    letters = tmp_path / "letters.jsonl"
    letters.write_text(json.dumps({"prompt": "=", "completion": "abcdefghijk"}) + "\n", encoding="utf-8")
    trainer = {**BEST, "eval_steps": 2}
    options = {
        **short_run,
        "learning_rate": 0.1,
        "eval_data": str(letters),
        "save_steps": 2,
        "trainer": trainer,
    }
    summary = finetune(make_config(("test", options)))
    lines = (Path(short_run["output"]) / "metrics.jsonl").read_text().splitlines()
    held_out = [line["held_out_loss"] for line in map(json.loads, lines) if "held_out_loss" in line]
    evaluated = held_out[1:4]
    assert evaluated[0] < evaluated[1] < evaluated[2], "the model gets better at letters"
    assert summary["held_out_loss"]["after"] == held_out[-1] == pytest.approx(evaluated[0], rel=1e-6)
