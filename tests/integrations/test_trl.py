"""TRL's trainers, tiny: layers are sampled, and samplers that measure do so by the trainer's own loss."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from layersample import ConfigError, LayerSamplingCallback, Measurement
from layersample.integrations.first_batches import FirstBatches
from layersample.integrations.trainer_loss import OwnLosses
from layersample.sampling.calibration import loss_of
from layersample.training.models import load_model
from tests.helpers import Given, weights_of

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's advice

PAIRS = [
    {"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": " I can't say" * (1 + i % 3)} for i in range(6)
]
KINDS = ["sft", "dpo", "reward", "grpo"]


def reward_text(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def make(kind: str, model_folder: Path, output: Path, **more: Any) -> Any:
    model, tokenizer = load_model(str(model_folder))
    common: dict[str, Any] = {
        **{"output_dir": str(output), "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none"},
        **{"use_cpu": True, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "seed": 3},
        **{"dataloader_pin_memory": False, "disable_tqdm": True, "bf16": False, **more},
    }
    data = Dataset.from_list(PAIRS)
    if kind == "sft":
        rows = Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS])
        return SFTTrainer(model, SFTConfig(**common), train_dataset=rows, processing_class=tokenizer)
    if kind == "dpo":
        return DPOTrainer(model, args=DPOConfig(**common), train_dataset=data, processing_class=tokenizer)
    if kind == "reward":
        torch.manual_seed(0)
        scored = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
        return RewardTrainer(
            scored, args=RewardConfig(**common), train_dataset=data, processing_class=tokenizer
        )
    config = GRPOConfig(**common, num_generations=2, max_completion_length=6, beta=0.1)
    return GRPOTrainer(
        model,
        reward_text,
        args=config,
        train_dataset=data.select_columns("prompt"),
        processing_class=tokenizer,
    )


def state_of(trainer: Any) -> dict[str, Any]:
    """Figures and counters that measuring might move."""
    names = ("_metrics", "_step", "_buffered_inputs", "_total_train_tokens", "_logs", "_pending_metrics")
    return deepcopy({name: getattr(trainer, name, None) for name in names} | {"state": vars(trainer.state)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_layers_train(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = make(kind, tiny_model, tmp_path)
    before = weights_of(trainer.model)
    sampling = LayerSamplingCallback(
        "cyclic", num_active=1, period=2, check=True, embeddings="freeze", head="freeze"
    ).attach(trainer)
    trainer.train()
    after = weights_of(trainer.model)
    changed = {
        name.split(".")[2]
        for name in after
        if ".layers." in name and not torch.equal(after[name], before[name])
    }
    assert sampling.scheduler is not None and len(changed) == 2, changed
    logged = [line["active_layers"] for line in trainer.state.log_history if "active_layers" in line]
    assert len(logged) == 4 and logged[0] == logged[1] != logged[2] == logged[3]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("lora_norm", {"probe_steps": 2, "probe_rank": 2}), ("owlore", {"threshold": 3.0, "num_batches": 2})],
    ids=["lora_norm", "owlore"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_measure_by_the_trainer_s_own_loss(
    kind: str, sampler: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    trainer = make(kind, tiny_model, tmp_path)
    sampling = LayerSamplingCallback(sampler, period=2, sampler_options=options).attach(trainer)
    trainer.train()
    scheduler: Any = sampling.scheduler
    scores = list(scheduler.sampler.scores.values())
    assert len(scores) == 4 and len(set(scores)) > 1 and all(score >= 0 for score in scores)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_no_trace(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = make(kind, tiny_model, tmp_path)
    loader = trainer.get_train_dataloader()
    before, random, mode = state_of(trainer), torch.get_rng_state(), trainer.model.training
    losses = []
    for _ in range(2):
        first, second, *_ = OwnLosses(trainer, loader, 2)()
        losses.append([float(batch.compute(trainer.model)) for batch in (first, second)])
    assert losses[0] == losses[1]
    if kind == "dpo":  # where the model is still its own reference
        assert losses[0] == pytest.approx([math.log(2)] * 2)
    if kind == "reward":
        inputs = dict(next(FirstBatches(loader, 2)()), use_cache=False)
        chosen, rejected = trainer.model(**inputs).logits.squeeze(-1).chunk(2)
        assert losses[0][0] == pytest.approx(-logsigmoid(chosen - rejected).mean().item())
    assert state_of(trainer) == before
    assert torch.equal(torch.get_rng_state(), random) and trainer.model.training == mode
    assert not hasattr(trainer, "current_gradient_accumulation_steps")


class Measuring(Given):
    """The same sets as those of Given, with a look at the trainer's loss before each."""

    measure_every = 1
    losses: list[float]

    def measure(self, measurement: Measurement) -> None:
        batches = measurement.read("Looking at the loss", 2)
        with torch.no_grad():
            self.losses = [float(loss_of(measurement.model, batch)) for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_whether_or_not_a_sampler_measures(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    weights, logs = [], []
    samplers = [Given((0, 1), (2, 3)), Measuring((0, 1), (2, 3))]
    for sampler in samplers:
        trainer = make(kind, tiny_model, tmp_path)
        LayerSamplingCallback(sampler, period=2).attach(trainer)
        trainer.train()
        weights.append(weights_of(trainer.model))
        timed = ("time", "runtime", "second", "layer")  # of a measured layer nothing else is told
        logs.append(
            [
                {k: v for k, v in line.items() if not any(t in k for t in timed)}
                for line in trainer.state.log_history
            ]
        )
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logs[0] == logs[1]
    assert len(samplers[1].losses) == 2  # type: ignore[attr-defined]


def test_a_callback_that_is_not_attached_says_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make("reward", tiny_model, tmp_path)
    trainer.add_callback(LayerSamplingCallback("lora_norm", period=2))
    with pytest.raises(ConfigError, match=r"LayerSamplingCallback\(...\).attach\(trainer\)"):
        trainer.train()
