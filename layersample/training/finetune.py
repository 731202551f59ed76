"""The main job: model + data + sampler → trained model, with TRL's SFTTrainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_callback import PrinterCallback

from layersample.checkpoints.seal import find_last, step_of
from layersample.config import TrainConfig, check_length, write_yaml
from layersample.environment import warn_of_slow_bf16
from layersample.errors import ConfigError
from layersample.files import replace_folder, write_json, write_text
from layersample.integrations.transformers import LayerSamplingCallback
from layersample.planning.budget import apply_budget
from layersample.registry import PROJECTIONS, create_sampler, load_plugin
from layersample.training.arguments import callback_arguments, training_arguments
from layersample.training.data import load_split
from layersample.training.models import load_model
from layersample.training.recording import Progress, RunRecorder
from layersample.training.run_folder import RunFolder
from layersample.training.summary import summarize, write_pictures
from layersample.training.trainer import CheckedTrainer, Interrupted, stop_on_signal

Report = Callable[[str], None]


def finetune(
    config: TrainConfig, *, progress: Progress | None = None, report: Report = lambda _: None
) -> dict[str, Any]:
    """Fine-tune a model as a configuration says, and write everything into its output folder.

    All input is checked before any work. The folder holds ``config.yaml``, ``metrics.jsonl`` (a line a step),
    ``summary.json``, ``layers.png``, ``loss.png``, ``model/`` (safetensors) and ``checkpoints/``.

    Args:
        config: All options.
        progress: Shows each step.
        report: Told, in sentences, what happens.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigError: If the configuration, the data or a folder can't be used.
        NonFiniteLossError: If the loss is NaN or infinite. Earlier checkpoints stay.
        Interrupted: After SIGINT or SIGTERM, with a checkpoint saved at the end of the step.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "layersample train must run in one process, but was launched in several. Use a script of your own with "
            "LayerSamplingCallback(...).attach(trainer), as examples/torchrun/distributed_sft.py."
        )
    if config.plugin is not None:
        load_plugin(config.plugin)
    # Names and options, before anything is loaded.
    create_sampler(config.sampler, config.sampler_options)
    PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)
    if config.budget is not None:
        config = apply_budget(config)
        report(f"A budget of {config.budget} allows {config.num_active} layers at a time.")
    folder = RunFolder.choose(config)
    arguments = training_arguments(config, folder.checkpoints)
    report(f"Model {config.model}, data {config.data}, output {folder.path}.")
    if slow := warn_of_slow_bf16(config.precision):
        report(slow)
    train, held_out = load_split(
        config.data, config.eval_data, eval_size=config.eval_size, seed=config.run_seed
    )
    model, tokenizer = load_model(
        config.model, torch.bfloat16 if config.precision == "bf16" else torch.float32, report
    )
    check_length(config, model.config)
    sampling = LayerSamplingCallback(**callback_arguments(config))
    with folder.open() as checkpoint:
        # A later --resume takes what the run is from here; how it was begun is the command's own.
        own = config.model_copy(update={"resume": False, "overwrite": False, "allow_changes": False})
        write_text(folder.path / "config.yaml", write_yaml(own))
        recorder = RunRecorder(
            folder.path / "metrics.jsonl",
            lambda: sampling.scheduler,
            resume_step=step_of(checkpoint) if checkpoint else None,
            progress=progress,
        )
        trainer = CheckedTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        if config.chunk_positions is not None:
            trainer.chunk_loss(config.chunk_positions)
        trainer.remove_callback(PrinterCallback)
        sampling.attach(trainer, verify=False)  # RunFolder has done that, before anything was loaded
        for name, count in trainer.too_long.items():
            if count:
                kind = name.replace("_", "-")
                report(f"{count} {kind} examples are longer than {config.max_length} tokens and are cut.")
        # Not before training begins: the scheduler checks the model first, and takes seconds to say no.
        trainer.args.eval_on_start = not any("held_out_loss" in record for record in recorder.records)
        try:
            _train(trainer, checkpoint)
            if "held_out_loss" not in recorder.records[-1]:  # the Trainer may have evaluated the last step
                trainer.evaluate()
        finally:
            if progress:
                progress.end()
        assert sampling.scheduler is not None
        trained = trainer.accelerator.unwrap_model(trainer.model)
        weights = sampling.scheduler.fp32_state_dict() if config.save_precision == "fp32" else None
        _save_model(trained, weights, tokenizer, folder.path / "model")
        summary = summarize(
            folder.path,
            config,
            recorder,
            layers=sampling.scheduler.layers,
            parameters=sum(p.numel() for p in model.parameters()),
            examples={
                "training": len(train),
                "held_out": len(held_out),
                **{f"{name}_cut_to_max_length": count for name, count in trainer.too_long.items()},
            },
        )
        write_pictures(folder.path, summary, recorder.records)
        write_json(folder.path / "summary.json", summary)
    return summary


def _train(trainer: CheckedTrainer, checkpoint: Path | None) -> None:
    with stop_on_signal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None:
        saved = find_last(Path(str(trainer.args.output_dir)))
        assert saved is not None
        raise Interrupted(stop.received, saved)


def _save_model(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
) -> None:
    with tempfile.TemporaryDirectory(prefix=".model-", dir=target.parent) as scratch:
        whole = Path(scratch) / "model"
        model.save_pretrained(whole, state_dict=weights)
        if weights is not None:  # save_pretrained notes the type that the model has
            config = AutoConfig.from_pretrained(whole)
            config.dtype = torch.float32
            config.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        replace_folder(whole, target)
