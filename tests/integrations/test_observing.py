"""Every sampler in a Trainer that is resumed: the same draws, scores and weights, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerSamplingCallback, list_samplers
from tests.helpers import weights_of
from tests.integrations.test_transformers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BUILT_IN = sorted(
    name for name, cls in list_samplers().items() if cls.__module__.startswith("layersample_strategies")
)
OPTIONS: dict[str, dict[str, Any]] = {  # those that must be there, or make a measurement short
    "lora_norm": {"probe_steps": 1, "probe_rank": 2},
    "owlore": {"metric": "hill"},
    "grass": {"probe_batches": 1},
    "prior": {"weights": "increase"},
    "max_wait": {"sampler": "freeze_converged", "sampler_options": {"sampler": "misa"}},
}


@pytest.mark.parametrize("sampler", BUILT_IN)
def test_a_resumed_trainer_is_the_one_that_was_not_interrupted(sampler: str, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> tuple[Any, Any]:
        projected = list_samplers()[sampler].needs_projection
        callback = LayerSamplingCallback(
            sampler,
            sampler_options=OPTIONS.get(sampler),
            projection="galore" if projected else None,
            projection_options={"rank": 4} if projected else None,
            period=2,
            num_active=1,
        )
        trainer = make_trainer(tmp_path / folder, callback, save_strategy="steps", save_steps=3, max_steps=5)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.scheduler is not None and trainer.model is not None
        return callback.scheduler, weights_of(trainer.model)

    whole, weights = run("whole")
    again, others = run("again", str(tmp_path / "whole" / "checkpoint-3"))
    assert whole.state_dict() == again.state_dict() and whole.round >= 2
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_a_bandit_needs_every_step_s_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LayerSamplingCallback("bandit", period=2), logging_steps=5)
    with pytest.raises(
        ConfigError, match="Sampler bandit, period 0: .* was told that of 0: .*logging_steps=1"
    ):
        trainer.train()
