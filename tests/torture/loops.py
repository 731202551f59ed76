"""Runs that can be killed at any moment and begun again: a plain loop, the Trainer and `layersample train`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from layersample import Checkpoints, LayerSamplingCallback, LayerScheduler
from layersample.checkpoints.seal import find_last
from layersample.config import make_config
from layersample.training.finetune import finetune
from tests.helpers import make_batch, make_llama
from tests.torture.samplers import ADAPTIVE, FIXED, least_period

LOOPS = ("plain", "trainer", "train")
_OPTIONS = "num_active period state projection granularity inactive frozen_weights switch_warmup".split()
Result = dict[str, Any]


def draw(seed: int, index: int, loops: tuple[str, ...] = LOOPS) -> dict[str, Any]:
    """A random run; the same for the same numbers."""
    rng = random.Random(f"run {seed} {index}")
    period, projection = rng.randint(1, 4), rng.choice((None, None, "galore", "fira", "apollo"))
    inactive, frozen_weights = rng.choice(
        ((None, None), (None, None), ("sgd", None), (None, "int8"), (None, "nf4"))
    )
    sampler = rng.choice(list(FIXED if rng.random() < 0.5 else ADAPTIVE))
    return {
        "loop": rng.choices(loops, [{"plain": 6, "trainer": 3, "train": 1}[loop] for loop in loops])[0],
        "sampler": sampler,
        "granularity": rng.choice(("layer", "layer", "block", "module", "tensor")),
        "inactive": inactive or "freeze",
        "frozen_weights": frozen_weights,
        "switch_warmup": rng.choice((0, 0, 1, 3)),
        "num_active": rng.randint(1, 4),
        "period": max(period, least_period(sampler)),
        "state": rng.choice(("drop", "keep", "offload")),
        "projection": projection,
        "options": {"rank": 4, "update_gap": rng.randint(1, 3)} if projection else {},
        "bf16": rng.random() < 0.5,
        "steps": rng.randint(4, 9),
        "save": rng.randint(1, 4),
        "keep": rng.randint(1, 3),
    }


def run(case: dict[str, Any], folder: Path, shared: Path) -> Result:
    """Begin a run, or go on with what is in its folder; give what it ends with.

    Args:
        case: Of :func:`draw`.
        folder: The run's.
        shared: Holds a tiny model (``model``) and data (``sums.jsonl``).
    """
    random.seed(0)
    torch.manual_seed(0)
    if case["loop"] == "plain":
        return _plain(case, folder)
    return _trainer(case, folder) if case["loop"] == "trainer" else _train(case, folder, shared)


def _scheduler_options(case: dict[str, Any]) -> dict[str, Any]:
    more = {"projection_options": case["options"] or None, "sampler_options": _sampler_options(case)}
    return {**{key: case[key] for key in _OPTIONS}, **more, "seed": 1}


def _sampler_options(case: dict[str, Any]) -> dict[str, Any]:
    return {**FIXED, **ADAPTIVE}[case["sampler"]]


def _model(case: dict[str, Any]) -> Any:
    return make_llama(4, dtype=torch.bfloat16 if case["bf16"] else torch.float32)


def _plain(case: dict[str, Any], folder: Path) -> Result:
    model = _model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, case["steps"])
    scheduler = LayerScheduler(model, optimizer, case["sampler"], **_scheduler_options(case))
    kept: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "scheduler": scheduler,
    }
    checkpoints = Checkpoints(folder, kept, keep=case["keep"])
    for step in range(checkpoints.load_last(), case["steps"]):
        batch = make_batch(random.randrange(100) + int(torch.randint(100, ())))  # both generators matter
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        scheduler.step(loss=loss)
        optimizer.zero_grad()
        if (step + 1) % case["save"] == 0:
            checkpoints.save(step + 1)
    return scheduler.fp32_state_dict()


def _trainer(case: dict[str, Any], folder: Path) -> Result:
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=case["steps"],
        save_steps=case["save"],
        save_strategy="steps",
        save_total_limit=case["keep"],
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,  # where samplers are told the loss
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=_model(case), args=arguments, train_dataset=Dataset.from_list(rows))
    callback = LayerSamplingCallback(case["sampler"], **_scheduler_options(case)).attach(trainer)
    last = find_last(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    assert callback.scheduler is not None
    return callback.scheduler.fp32_state_dict()


def _train(case: dict[str, Any], folder: Path, shared: Path) -> Result:
    resumes = find_last(folder / "checkpoints") is not None
    options = {
        "model": str(shared / "model"),
        "data": str(shared / "sums.jsonl"),
        "output": str(folder),
        "steps": case["steps"],
        "sampler": case["sampler"],
        "sampler_options": _sampler_options(case),
        **{key: case[key] for key in _OPTIONS},
        "projection_options": case["options"],
        "precision": "bf16" if case["bf16"] else "fp32",
        "eval_size": 2,
        "max_length": 16,
        "save_steps": case["save"],
        "resume": resumes,
        "overwrite": not resumes,
    }
    finetune(make_config(("torture", options)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "active", "round", "learning_rate", "held_out_loss")
    records = [{key: line[key] for key in kept if key in line} for line in lines]
    return {**load_file(folder / "model" / "model.safetensors"), "records": json.dumps(records)}
