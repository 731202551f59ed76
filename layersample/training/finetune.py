"""The main job: model + data + sampler → trained model, with TRL's SFTTrainer, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from layersample.config import TrainConfig
from layersample.environment import slow_bf16_warning
from layersample.errors import ConfigError
from layersample.files import LOCK
from layersample.frozen.loading import freeze_model
from layersample.lengths import fit_length
from layersample.planning.budget import apply_budget
from layersample.registry import PROJECTIONS, create_sampler, load_plugin
from layersample.training.answers import template_columns
from layersample.training.arguments import training_arguments
from layersample.training.data import load_split
from layersample.training.models import load_config, load_model, load_tokenizer, resolve_model
from layersample.training.ranks import Ranks, join_ranks
from layersample.training.recording import Progress
from layersample.training.resuming import APART_FROM, keep_steps, ranks_of
from layersample.training.run import Report, Run
from layersample.training.run_folder import RunFolder
from layersample.training.sharding import as_launched, follow_launcher
from layersample.training.streaming import StreamedRows, stream_split
from layersample.training.trainer_options import check_trainer_options
from layersample.training.upload import Upload

_SEEN_AFTER = 10.0  # seconds in which a file that one machine writes shows on another


def finetune(
    config: TrainConfig, *, progress: Progress | None = None, report: Report = lambda _: None
) -> dict[str, Any]:
    """Fine-tune a model as a configuration says, and write everything into its output folder.

    All input is checked before any work. The folder holds ``config.yaml``, ``metrics.jsonl`` (a line a step),
    ``summary.json``, ``layers.png``, ``loss.png``, ``model/`` (safetensors) and ``checkpoints/``.

    Where a launcher (torchrun, ``accelerate launch``) has started several processes, each calls it with the same
    options. They train together; the first one writes and reports.

    Args:
        config: All options.
        progress: Shows each step.
        report: Told, in sentences, what happens.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ConfigError: If the configuration, the data or a folder can't be used, or the ranks have different ones; or
            if the trained model can't be uploaded.
        NonFiniteLossError: If the loss is NaN or infinite. Earlier checkpoints stay.
        Interrupted: After SIGINT or SIGTERM, with a checkpoint saved at the end of the step.
    """
    ranks = join_ranks(check_trainer_options(config.trainer or {}).get("ddp_timeout"))
    if not ranks.first:
        progress, report = None, lambda _: None
    ranks.compare("options", config.model_dump(mode="json"))
    config = _keep_steps(ranks.together(lambda: _check(config, ranks, report)), ranks, report)
    config, fitted = ranks.together(lambda: _fit_to_model(config), first_of_machine_first=True)
    if fitted is not None:
        report(fitted)
    upload = Upload(config, ranks)
    measures = create_sampler(config.sampler, config.sampler_options).measures
    with as_launched(config, measures=measures):
        summary = _finetune(config, ranks, progress, report)
    upload.send(Path(summary["output"]), report)
    ranks.leave()
    return summary


def _check(config: TrainConfig, ranks: Ranks, report: Report) -> TrainConfig:
    """Check names and options before anything is loaded, and choose what is left open."""
    config = follow_launcher(config)
    if config.plugin is not None:
        load_plugin(config.plugin)
    sampler = create_sampler(config.sampler, config.sampler_options)
    PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)
    if config.shard is not None:
        if not ranks.joined:
            raise ConfigError(
                f"shard {config.shard} gives each rank a part of the model, but this process was started alone: add "
                "--gpus and a number, or --processes and a number to try it on the CPU, or start it by torchrun."
            )
        if sampler.measures and sampler.measure_every is not None:
            raise ConfigError(
                f"Sampler {config.sampler} must measure once, before the model is cut into shards, but is to measure "
                f"every {sampler.measure_every} periods: leave that option out, or leave out shard {config.shard}."
            )
    if config.step_in_backward and ranks.count > 1:
        raise ConfigError(
            f"step_in_backward needs gradients that are whole in the backward pass, but those of {ranks.count} ranks "
            "are added up later: leave it out, or use one GPU."
        )
    if config.stream and (config.trainer or {}).get("packing"):
        raise ConfigError(
            "trainer: packing puts examples together before training begins, and stream reads them while it goes on: "
            "leave out one of them."
        )
    if config.save_steps is not None and config.epochs is None and config.save_steps > config.steps:
        report(
            f"No checkpoint is saved, because save_steps {config.save_steps} is more than the {config.steps} steps of "
            "the run: a run that is killed begins anew."
        )
    if config.budget is not None:
        config = apply_budget(config)
        report(f"A budget of {config.budget} allows {config.num_active} layers at a time.")
    return config


def _fit_to_model(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """What a model's configuration tells, before its data are read or its weights; also that there is no model."""
    shape = load_config(config.model)
    return (config, None) if shape is None else fit_length(config, shape)


def _keep_steps(config: TrainConfig, ranks: Ranks, report: Report) -> TrainConfig:
    """Have a run that is resumed on another number of ranks keep the examples of its steps."""
    batch_size, accumulation = ranks.on_first(lambda: keep_steps(config, ranks.count))
    if (batch_size, accumulation) == (config.batch_size, config.gradient_accumulation):
        return config
    report(
        f"So that a step has the same examples as before, on {ranks.count} rank{'s' * (ranks.count > 1)} the batch "
        f"size is {batch_size} and the gradient accumulation {accumulation}."
    )
    return config.model_copy(update={"batch_size": batch_size, "gradient_accumulation": accumulation})


def _finetune(config: TrainConfig, ranks: Ranks, progress: Progress | None, report: Report) -> dict[str, Any]:
    folder = _choose_folder(config, ranks)
    arguments = ranks.together(lambda: training_arguments(config, folder.checkpoints))
    report(f"Model {config.model}, data {config.data}, output {folder.path}.")
    if ranks.count > 1:
        how = (
            "each with all of the model" if config.shard is None else f"the model in shards ({config.shard})"
        )
        report(
            f"{ranks.count} ranks, {how}; a step has "
            f"{ranks.count * config.batch_size * config.gradient_accumulation} examples."
        )
    if arguments.torch_compile and (slow := slow_bf16_warning(config.precision)):
        report(slow)
    ranks.together(lambda: resolve_model(config.model, report), first_of_machine_first=True)
    keep = ranks.together(lambda: template_columns(load_tokenizer(config.model)))
    split = stream_split if config.stream else load_split
    train, held_out = data = ranks.together(
        lambda: split(
            config.data,
            config.eval_data,
            eval_size=config.eval_size,
            seed=config.run_seed,
            columns=config.columns,
            keep=keep,
        ),
        first_of_machine_first=True,
    )
    source = "that were held out of it" if config.eval_data is None else f"of {config.eval_data}"
    held = f"the held-out loss is measured on {len(held_out)} {source}."
    if isinstance(train, StreamedRows):
        report(f"{train.description} {held[0].upper()}{held[1:]}")
    else:
        report(f"{train.info.description} {len(train)} train; {held}")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model, tokenizer = ranks.together(lambda: load_model(config.model, dtype, report))
    ranks.together(lambda: fit_length(config, model.config))  # of a model that was fetched only now
    if config.frozen_weights is not None:
        # Before the Trainer moves it: a device that is too small for the whole model never has it whole.
        freeze_model(model, config.frozen_weights, arguments.device, config.layers)
    with _open(folder, ranks) as checkpoint:
        run = Run(
            config,
            folder.path,
            ranks,
            data=data,
            model=model,
            tokenizer=tokenizer,
            arguments=arguments,
            checkpoint=checkpoint,
            progress=progress,
        )
        run.say_what_is_learned(report)
        try:
            run.train()
        finally:
            if progress:
                progress.end()
        run.say_what_was_cut(report)
        run.save_model()
        return run.write_summary()


def _choose_folder(config: TrainConfig, ranks: Ranks) -> RunFolder:
    def choose() -> str:
        moved = config.resume and config.output is not None and ranks_of(config.output) != ranks.count
        return str(RunFolder.choose(config, APART_FROM if moved else ()).path)

    return RunFolder(Path(ranks.on_first(choose)), config.resume, config.overwrite)


@contextmanager
def _open(folder: RunFolder, ranks: Ranks) -> Iterator[Path | None]:
    """Have the first rank take the folder; give the checkpoint to resume from on all of them."""
    with ExitStack() as opened:

        def take() -> str | None:
            checkpoint = opened.enter_context(folder.open())
            return None if checkpoint is None else str(checkpoint)

        checkpoint = ranks.on_first(take)
        ranks.together(lambda: _check_shared(folder.path))
        yield None if checkpoint is None else Path(checkpoint)


def _check_shared(path: Path) -> None:
    """Make sure that a folder which the first rank has made is there on this rank too."""
    end = time.monotonic() + _SEEN_AFTER
    while not (path / LOCK).exists():
        if time.monotonic() > end:
            raise ConfigError(
                f"The output must lie on a file system that all machines share, because each rank writes its part of "
                f"a checkpoint, but there is no {path} here: choose another --output."
            )
        time.sleep(0.2)
