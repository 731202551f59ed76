"""The main job: model + data + sampler → trained model, with TRL's SFTTrainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from layersample.checkpoints.seal import find_last, step_of
from layersample.config import TrainConfig, check_length, write_yaml
from layersample.environment import slow_bf16_warning
from layersample.errors import ConfigError, short
from layersample.exporting.cards import CARD, model_card
from layersample.exporting.sources import MODEL
from layersample.files import replace_folder, write_json, write_text
from layersample.frozen.loading import freeze_model
from layersample.integrations.transformers import LayerSamplingCallback
from layersample.planning.budget import apply_budget
from layersample.registry import PROJECTIONS, create_sampler, load_plugin
from layersample.training.answers import is_conversation, show_learned
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
    config = _check(config, report)
    folder = RunFolder.choose(config)
    arguments = training_arguments(config, folder.checkpoints)
    report(f"Model {config.model}, data {config.data}, output {folder.path}.")
    if slow := slow_bf16_warning(config.precision):
        report(slow)
    train, held_out = data = load_split(
        config.data,
        config.eval_data,
        eval_size=config.eval_size,
        seed=config.run_seed,
        columns=config.columns,
    )
    source = "that were held out of it" if config.eval_data is None else f"of {config.eval_data}"
    report(
        f"{train.info.description} {len(train)} train; the held-out loss is measured on {len(held_out)} {source}."
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model, tokenizer = load_model(config.model, dtype, report)
    check_length(config, model.config)
    if config.frozen_weights is not None:
        # Before the Trainer moves it: a device that is too small for the whole model never has it whole.
        freeze_model(model, config.frozen_weights, arguments.device, config.layers)
    with folder.open() as checkpoint:
        run = _Run(config, folder.path, data, model, tokenizer, arguments, checkpoint, progress)
        run.say_what_is_learned(report)
        try:
            run.train()
        finally:
            if progress:
                progress.end()
        run.save_model()
        return run.write_summary()


def _check(config: TrainConfig, report: Report) -> TrainConfig:
    """Check names and options before anything is loaded, and choose what a budget leaves open."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "layersample train must run in one process, but was launched in several. Use a script of your own with "
            "LayerSamplingCallback(...).attach(trainer), as examples/torchrun/distributed_sft.py."
        )
    if config.plugin is not None:
        load_plugin(config.plugin)
    create_sampler(config.sampler, config.sampler_options)
    PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)
    if config.budget is not None:
        config = apply_budget(config)
        report(f"A budget of {config.budget} allows {config.num_active} layers at a time.")
    return config


class _Run:
    """A run whose input is loaded: its trainer, its recorder and its callback, and the folder it writes to."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        data: tuple[Dataset, Dataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: SFTConfig,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.config, self.folder, self.tokenizer, self.checkpoint = config, folder, tokenizer, checkpoint
        self.train_data, self.held_out_data = data
        # The Trainer turns off the cache, and TRL notes its own padding: neither is the model's.
        self.as_it_came = {key: getattr(model.config, key, None) for key in ("use_cache", "pad_token_id")}
        # A later --resume takes what the run is from here; how it was begun is the command's own.
        own = config.model_copy(update={"resume": False, "overwrite": False, "allow_changes": False})
        write_text(folder / "config.yaml", write_yaml(own))
        self.sampling = LayerSamplingCallback(**callback_arguments(config))
        self.recorder = RunRecorder(
            folder / "metrics.jsonl",
            lambda: self.sampling.scheduler,
            resume_step=step_of(checkpoint) if checkpoint else None,
            progress=progress,
        )
        self.trainer = CheckedTrainer(
            model=model,
            args=arguments,
            train_dataset=self.train_data,
            eval_dataset=self.held_out_data,
            processing_class=tokenizer,
            callbacks=[self.recorder],
            train_on=config.train_on,
        )
        self.own_loss = self.trainer.chunk_loss(
            config.chunk_positions or 0, strict=config.loss_chunk != "auto"
        )
        for callback in self.trainer.callback_handler.callbacks:
            # TensorBoard's files lie beside the run's, not among its checkpoints.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")
        self.trainer.remove_callback(PrinterCallback)
        self.sampling.attach(
            self.trainer, verify=False
        )  # RunFolder has done that, before anything was loaded

    def say_what_is_learned(self, report: Report) -> None:
        """Report what became of the data, and by which loss it is learned."""
        if self.own_loss:
            report(
                f"The loss is TRL's own, by the Trainer's option {self.own_loss}: loss_chunk has no effect on it."
            )
        if self.trainer.gave_template:
            report(
                "The tokenizer has no chat template, so it gets a plain one: User: …, Assistant: …, end of text."
            )
        if self.trainer.lost_answers:
            report(
                f"{self.trainer.lost_answers} answers aren't learned, because the chat template renders them "
                "differently once others follow."
            )
        for name, count in self.trainer.too_long.items():
            if count:
                kind = name.replace("_", "-")
                report(
                    f"{count} {kind} examples are longer than {self.config.max_length} tokens and are cut."
                )
        first: Any = self.trainer.train_dataset[0]  # type: ignore[index]
        pieces = show_learned(self.tokenizer, first["input_ids"], first["labels"])
        shown = "".join(f"«{text}»" if learned else text for text, learned in pieces)
        report(f"The first example, with what is learned in «»: {short(shown, 400)}")

    def train(self) -> None:
        """Train, and measure the held-out loss before and after.

        Raises:
            Interrupted: If a signal came, with a checkpoint saved.
        """
        # Not before training begins: the scheduler checks the model first, and takes seconds to say no.
        measured = any("held_out_loss" in record for record in self.recorder.records)
        self.trainer.args.eval_on_start = not measured
        with stop_on_signal() as stop:
            self.trainer.add_callback(stop)
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if stop.received is not None:
            saved = find_last(Path(str(self.trainer.args.output_dir)))
            assert saved is not None
            raise Interrupted(stop.received, saved)
        # The Trainer may have evaluated the last step.
        if not any("held_out_loss" in record for record in self.recorder.records[-2:]):
            self.trainer.evaluate()

    def save_model(self) -> None:
        """Write the model into ``model/``, in the precision that the configuration asks for."""
        assert self.sampling.scheduler is not None
        trained = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for key, value in self.as_it_came.items():
            setattr(trained.config, key, value)
        exact = self.config.save_precision == "fp32"
        weights = self.sampling.scheduler.fp32_state_dict() if exact else None
        _save_model(trained, weights, self.tokenizer, self.folder / MODEL)

    def write_summary(self) -> dict[str, Any]:
        """Write ``summary.json`` and the pictures, and return the summary."""
        assert self.sampling.scheduler is not None and self.trainer.model is not None
        summary = summarize(
            self.folder,
            self.config,
            self.recorder,
            layers=self.sampling.scheduler.layers,
            parameters=sum(p.numel() for p in self.trainer.model.parameters()),
            examples={
                "training": len(self.train_data),
                "held_out": len(self.held_out_data),
                **{f"{name}_cut_to_max_length": count for name, count in self.trainer.too_long.items()},
            },
            conversations=is_conversation(self.train_data.features),
        )
        summary["period"] = self.sampling.scheduler.period
        if self.sampling.scheduler.frozen is not None:
            summary["frozen_weights"] = self.sampling.scheduler.frozen.describe()
        write_pictures(self.folder, summary, self.recorder.records)
        write_json(self.folder / "summary.json", summary)
        write_text(self.folder / MODEL / CARD, model_card(self.config, summary))
        return summary


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
