"""The main job: model + data + sampler → trained model, with TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from layersample.checkpoints import find_last, step_of
from layersample.config import TrainConfig, check_length, write_yaml
from layersample.data import load_split
from layersample.errors import ConfigError, unknown
from layersample.files import replace_folder, write_json, write_text
from layersample.head import ChunkedLoss
from layersample.integrations.transformers import LayerSamplingCallback
from layersample.models import load_model
from layersample.planner import apply_budget
from layersample.recording import Progress, RunRecorder
from layersample.registry import PROJECTIONS, create_sampler, load_plugin
from layersample.run_folder import RunFolder
from layersample.summary import summarize, write_pictures

Report = Callable[[str], None]
_NAMES = {"train": "training", "eval": "held_out"}  # what SFTTrainer calls the data, and what we do


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message says at which step, and which checkpoint is good."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved a checkpoint.

    Args:
        signal_number: The signal.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal_number}; saved {checkpoint}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


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
    train, held_out = load_split(config.data, config.eval_data, eval_size=config.eval_size, seed=config.seed)
    model, tokenizer = load_model(
        config.model, torch.bfloat16 if config.precision == "bf16" else torch.float32, report
    )
    check_length(config, model.config)
    sampling = LayerSamplingCallback(config.sampler, **scheduler_arguments(config))
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
        if config.loss_chunk:
            trainer.chunk_loss(config.loss_chunk)
        trainer.remove_callback(PrinterCallback)
        sampling.attach(trainer)
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
    with _stop_on_signal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None:
        saved = find_last(Path(str(trainer.args.output_dir)))
        assert saved is not None
        raise Interrupted(stop.received, saved)


class CheckedTrainer(SFTTrainer):
    """SFTTrainer that counts what it cuts, and stops at a loss that is no number."""

    def __init__(self, **kwargs: Any) -> None:
        self.too_long: dict[str, int] = {}
        self._chunks_loss = False
        super().__init__(**kwargs)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, name: str
    ) -> Any:
        # Tokenized without a limit first: SFTTrainer takes tokenized data as it is and then cuts it.
        limit, args.max_length = args.max_length, None
        try:
            whole = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, name)
        finally:
            args.max_length = limit
        if limit is not None and not packing:
            self.too_long[_NAMES.get(name, name)] = sum(len(ids) > limit for ids in whole["input_ids"])
        ready = super()._prepare_dataset(whole, processing_class, args, packing, formatting_func, name)
        if not len(ready):
            raise ConfigError(
                f"No {_NAMES.get(name, name)} example is left, because the prompts alone fill "
                f"max_length={limit} tokens: raise it."
            )
        return ready

    def chunk_loss(self, positions: int) -> None:
        """Compute the training loss from the logits of some positions at a time."""
        assert self.model is not None
        ChunkedLoss(self.model, chunk_size=positions)
        self._chunks_loss = True

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The chunked loss in training, where it is on; else SFTTrainer's own.

        Raises:
            NonFiniteLossError: In training, if the loss is no number; before backward, which may already step.
        """
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        # SFTTrainer asks for its own fused loss; the Trainer that it extends, for the model's.
        compute = partial(Trainer.compute_loss, self) if self._chunks_loss else super().compute_loss
        loss: Any = compute(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            saved = find_last(Path(str(self.args.output_dir)))
            good = f"The last good checkpoint is {saved}." if saved else "There is no checkpoint yet."
            raise NonFiniteLossError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, so training stops before this "
                f"step changes any weight. {good} A lower learning rate or float32 may help."
            )
        return loss


class _StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.received: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # asked twice: at once, without a checkpoint
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def _stop_on_signal() -> Iterator[_StopOnSignal]:
    stop = _StopOnSignal()
    try:
        before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are someone else's
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def scheduler_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of a ``LayerScheduler`` in a configuration."""
    names = ("num_active", "period", "seed", "sampler_options", "layers", "state", "check", "projection")
    rules = ("embeddings", "head", "norm", "other")
    arguments = {name: getattr(config, name) for name in (*names, *rules, "master_weights", "allow_changes")}
    arguments |= {"step_in_backward": config.backward_stepping, "recompute": config.recompute}
    return {**arguments, "projection_options": config.projection_arguments}


def training_arguments(config: TrainConfig, checkpoints: Path) -> SFTConfig:
    """The Trainer's arguments in a configuration; it uses one GPU, however many there are.

    Args:
        config: The configuration.
        checkpoints: Folder of the checkpoints.

    Raises:
        ConfigError: If an option of ``trainer`` is unknown, or they don't go together.
    """
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    for key in config.trainer:
        if key not in known:
            raise ConfigError(f"trainer: {unknown('option of SFTConfig', key, known)}")
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
        "max_grad_norm": 0.0 if config.step_in_backward else config.clip,
        "max_length": config.max_length,
        "bf16": config.precision == "bf16-mixed",
        "fp16": config.precision == "fp16-mixed",
        "seed": config.seed,
        "logging_steps": 1,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        made = SFTConfig(**{**arguments, **config.trainer, "output_dir": str(checkpoints)})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The training options don't go together: {error}") from error
    # Of several GPUs in one process the Trainer would make nn.DataParallel.
    made._n_gpu = min(made.n_gpu, 1)
    return made


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
