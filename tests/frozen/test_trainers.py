"""Frozen weights in Hugging Face's Trainer and TRL: checkpoints are exact, resumed to the bit, and the best is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from layersample import LayerSamplingCallback, StepInBackward
from tests.helpers import Given, make_llama, weights_of
from tests.integrations.test_trainer_checkpoints import SAVING, Fails
from tests.integrations.test_transformers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


def made(folder: Path, form: str, callback: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    sampling = LayerSamplingCallback(
        "lisa", num_active=1, period=3, seed=5, check=True, frozen_weights=form, **(callback or {})
    )
    model = make_llama(dtype=torch.bfloat16)
    # A step in backward can't clip by the norm of all gradients.
    trainer = make_trainer(folder, None, model=model, **{**SAVING, "max_grad_norm": 0.0, **arguments})
    sampling.attach(trainer)
    return trainer


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    ("form", "callback"),
    [("nf4", {}), ("int8", {"step_in_backward": StepInBackward()}), ("nf4", {"master_weights": False})],
    ids=["nf4", "int8-in-backward", "nf4-no-masters"],
)
def test_a_checkpoint_in_mid_period_is_exact_and_resumed_to_the_bit(
    form: str, callback: dict[str, Any], tmp_path: Path
) -> None:
    whole = made(tmp_path / "whole", form, callback)
    whole.train()
    expected = weights_of(whole.model)
    assert same(load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors"), expected)
    stopped = made(tmp_path / "part", form, callback)
    stopped.add_callback(Fails())
    with pytest.raises(RuntimeError, match="out of memory"):
        stopped.train()
    saved = [load_file(tmp_path / part / "checkpoint-2" / "model.safetensors") for part in ("whole", "part")]
    assert same(*saved) and not same(saved[0], expected)
    resumed = made(tmp_path / "part", form, callback)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(resumed.model), expected)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = made(
        tmp_path,
        "nf4",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls, so that the first checkpoint is the one
    )
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    found = weights_of(trainer.model)
    assert same(found, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert not same(found, load_file(tmp_path / "checkpoint-6" / "model.safetensors"))


def test_in_trl(tmp_path: Path, tiny_model: Path) -> None:
    sampling = LayerSamplingCallback(
        Given((1,), (2,)), num_active=1, period=3, head="freeze", frozen_weights="int8", check=True
    )
    model = make_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        None,
        model=model,
        trainer=SFTTrainer,
        options=SFTConfig,
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        **SAVING,
    )
    sampling.attach(trainer)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(saved[name], value) == (
            ".layers.0." in name or ".layers.3." in name or "lm_head" in name
        )
