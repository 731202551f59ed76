"""Samplers that learn from training, in a Trainer: what it logs is what they are told, and a resumed run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerSamplingCallback
from tests.helpers import weights_of
from tests.integrations.test_transformers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("sampler", ["bandit", "grass", "blockllm"])
def test_a_resumed_trainer_s_sampler_has_learned_the_same(sampler: str, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> tuple[Any, Any]:
        callback = LayerSamplingCallback(sampler, period=2, num_active=1)
        trainer = make_trainer(tmp_path / folder, callback, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.scheduler is not None and trainer.model is not None
        return callback.scheduler, weights_of(trainer.model)

    whole, weights = run("whole")
    again, others = run("again", str(tmp_path / "whole" / "checkpoint-3"))
    assert whole.sampler.state_dict() == again.sampler.state_dict() and whole.round == again.round == 2
    assert whole.state_dict()["gradients"] == again.state_dict()["gradients"]
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_a_bandit_needs_every_step_s_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LayerSamplingCallback("bandit", period=2), logging_steps=5)
    with pytest.raises(
        ConfigError, match="Sampler bandit, period 0: .* was told that of 0: .*logging_steps=1"
    ):
        trainer.train()
