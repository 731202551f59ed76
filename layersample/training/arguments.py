"""The arguments of the scheduler and of the Trainer in a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.training.idle_options import check_best, refuse_idle
from layersample.training.trainer_options import check_trainer_options, make_arguments


def callback_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of a ``LayerSamplingCallback`` in a configuration."""
    # The loss is the trainer's own to chunk, which has other losses than the model's as well.
    return {**config.scheduler_options.arguments(), "recompute": config.recompute, "loss_chunk": None}


def training_arguments(config: TrainConfig, checkpoints: Path) -> SFTConfig:
    """The Trainer's arguments in a configuration; a process uses one GPU, however many there are.

    Args:
        config: The configuration.
        checkpoints: Folder of the checkpoints.

    Raises:
        ConfigError: If an option of ``trainer`` is unknown, has no effect, or they don't go together.
    """
    given = check_trainer_options(config.trainer or {})
    check_best(given, config.save_steps)
    arguments: dict[str, Any] = {
        "max_steps": config.steps if config.epochs is None else -1,
        "num_train_epochs": config.epochs or 1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": 0.0 if config.step_in_backward else config.clip or 0.0,
        "max_length": config.max_length,
        # None: prompts aren't learned; of conversations, what is learned is the trainer's to mark.
        "completion_only_loss": False if config.train_on == "all" else None,
        "bf16": config.precision == "bf16-mixed",
        "fp16": config.precision == "fp16-mixed",
        "seed": config.run_seed,
        "logging_steps": 1,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # The scheduler builds DDP's buckets anew at each switch, so there is nothing to look for.
        "ddp_find_unused_parameters": False,
    }
    made = make_arguments({**arguments, **given, "output_dir": str(checkpoints)})
    refuse_idle(given, made, steps=config.steps if config.epochs is None else None, stream=config.stream)
    if made.save_only_model:
        raise ConfigError(
            "trainer: save_only_model must be off, because a checkpoint of the model alone resumes no run: "
            "the folder of a run holds its model beside the checkpoints in any case."
        )
    exact = config.precision == "bf16" and config.save_precision == "fp32"
    if made.load_best_model_at_end and exact:
        raise ConfigError(
            "save_precision fp32 saves bf16 weights with what their masters hold beyond them, which a "
            "checkpoint's model lacks: leave out trainer: load_best_model_at_end, or choose save_precision model."
        )
    # Of several GPUs in one process the Trainer would make nn.DataParallel.
    made._n_gpu = min(made.n_gpu, 1)
    return made
