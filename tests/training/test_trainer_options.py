"""Options for TRL's SFTConfig."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl import SFTConfig

from layersample import ConfigError
from layersample.config import TrainConfig, make_config
from layersample.training.arguments import training_arguments
from layersample.training.finetune import finetune
from layersample.training.trainer_options import (
    _NOT_OURS_TO_CHANGE,
    SAME_THING,
    check_trainer_options,
    own_loss,
)
from tests.helpers import make_mixtral

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


def test_values_are_converted_to_the_types_that_sftconfig_declares() -> None:
    given = {"adam_beta1": 0.8, "eval_steps": 2, "packing": True, "optim_args": "a=1", "data_seed": 5}
    assert check_trainer_options(given) == given
    with pytest.raises(ConfigError, match="adam_beta1: Input should be a number, not text, but got '0.8'"):
        check_trainer_options({"adam_beta1": "0.8"})


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(SFTConfig)))
def test_no_option_takes_an_object_that_it_can_t_be(name: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer: {name}"):
        check_trainer_options({name: "a\0b"})


@pytest.mark.parametrize(("theirs", "ours"), SAME_THING.items())
def test_one_thing_has_one_option(theirs: str, ours: str) -> None:
    assert ours in TrainConfig.model_fields
    with pytest.raises(ConfigError, match=f"trainer: (Unknown option|{theirs} must be left out.* {ours} )"):
        check_trainer_options({theirs: 1})


def test_what_the_run_sets_can_t_be_set_beside_it(tmp_path: Path) -> None:
    """Whatever arguments.py sets is either refused or free for the user, never dropped."""
    made = training_arguments(make_config(("x", {"steps": 7})), tmp_path)
    assert made.max_steps == 7
    free = {
        "save_total_limit",
        "logging_steps",
        "report_to",
        "disable_tqdm",
        "use_cpu",
        "dataloader_pin_memory",
        "ddp_find_unused_parameters",
    }
    source = (Path(__file__).parents[2] / "layersample" / "training" / "arguments.py").read_text()
    for field in dataclasses.fields(SFTConfig):
        if f'"{field.name}":' in source:
            assert field.name in {*SAME_THING, *_NOT_OURS_TO_CHANGE, *free, "per_device_eval_batch_size"}


@pytest.mark.parametrize(
    "option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.5}], ids=["dft", "label smoothing"]
)
def test_a_loss_that_isn_t_the_model_s_is_never_replaced(
    option: dict[str, Any], tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    def losses(**more: Any) -> list[float]:
        options: dict[str, Any] = {
            "model": str(tiny_model), "data": str(sums), "output": tmp_path / "run", "overwrite": True,
            "steps": 3, "eval_size": 2, "learning_rate": 1e-2, "max_length": 16, **more,
        }  # fmt: skip
        finetune(make_config(("test", options)), report=said.append)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    said: list[str] = []
    chunked = losses(trainer=option)
    (name, value), *_ = option.items()
    assert (
        f"The loss is TRL's own, by the Trainer's option {name}={value}: loss_chunk has no effect on it."
        in said
    )
    assert chunked == losses(trainer=option, loss_chunk=0)
    assert chunked != pytest.approx(losses(), rel=1e-2), "the option has an effect"


def test_what_makes_another_loss() -> None:
    assert own_loss(SFTConfig("x", use_cpu=True)) is None
    assert own_loss(SFTConfig("x", use_cpu=True, loss_type="dft")) == "loss_type=dft"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_model_s_configuration_and_the_log_are_left_in_order(
    kind: str, tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    model = tiny_model
    if kind == "mixtral":  # TRL switches its router's loss on
        model = tmp_path / "mixtral"
        tokenizer, experts = AutoTokenizer.from_pretrained(tiny_model), make_mixtral()
        experts.config.update({key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")})
        for part in (tokenizer, experts):
            part.save_pretrained(model)
    options = {
        "model": str(model), "data": str(sums), "output": tmp_path / "run", "steps": 2, "eval_size": 2,
        "max_length": 16, "trainer": {"report_to": "tensorboard"},
    }  # fmt: skip
    finetune(make_config(("test", options)))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "run" / "model")
    )
    assert before == after
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert not list((tmp_path / "run" / "checkpoints").rglob("events.*"))
