"""``layersample train``: fine-tune a model, a few layers at a time."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import typer

from layersample.cli.consoles import console, errors, plain
from layersample.cli.flags import own_option, with_options
from layersample.cli.launch import (
    check_count,
    how_to_resume,
    is_first,
    is_rank,
    launch,
    lost_others,
)
from layersample.cli.launcher_watch import end_with_launcher
from layersample.cli.quiet import quiet_libraries
from layersample.cli.settings import gather_settings
from layersample.config import TrainConfig
from layersample.errors import NEEDS_TRAIN, ConfigError

_PANEL = "Several GPUs"  # as the section of the configuration is called
_OWN_OPTIONS = (
    own_option(
        "gpus",
        int | None,
        None,
        typer.Option(
            min=1, max=1024, help="Start a process for each of so many GPUs.", rich_help_panel=_PANEL
        ),
    ),
    own_option(
        "processes",
        int | None,
        None,
        typer.Option(
            min=1, max=1024, help="Start so many on the CPU, to try several ranks.", rich_help_panel=_PANEL
        ),
    ),
)


@with_options(first=_OWN_OPTIONS)
def train(
    *,
    config: Path | None = None,
    preset: str | None = None,
    sampler_option: list[str] | None = None,
    projection_option: list[str] | None = None,
    trainer_option: list[str] | None = None,
    gpus: int | None = None,
    processes: int | None = None,
    **flags: Any,
) -> None:
    """Fine-tune a model, a few layers at a time.

    Without options: SmolLM2-135M on grade-school problems with LISA, about three minutes on two cores.
    """
    if is_rank():
        end_with_launcher()
    settings = gather_settings(config, preset, sampler_option, projection_option, trainer_option, flags)
    if is_rank():
        check_count(gpus, processes)
    elif gpus is not None or processes is not None:
        launch(gpus, processes)
        return
    _run(settings)


def _run(settings: TrainConfig) -> None:
    # Seconds of imports that the other commands don't need.
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Training {NEEDS_TRAIN}") from error

    from layersample.cli.display import LiveProgress, print_config, print_summary
    from layersample.training.finetune import finetune
    from layersample.training.trainer import Interrupted, NonFiniteLossError

    quiet_libraries(reads_data=True)
    if not is_first():
        console.quiet = True
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    print_config(console, settings)
    try:
        summary = finetune(settings, progress=LiveProgress(console), report=_report)
    except NonFiniteLossError as error:  # of all ranks alike, as is a checkpoint
        _say(f"[bold red]Stopped:[/] {plain(error)}")
        raise typer.Exit(1) from error
    except Interrupted as error:
        again = how_to_resume(error.checkpoint.parent.parent)
        plugin = f" --plugin {settings.plugin}" if settings.plugin else ""
        _say(plain(f"Interrupted. A checkpoint is in {error.checkpoint}; continue with: {again}{plugin}"))
        raise typer.Exit(128 + error.signal_number) from error
    except KeyboardInterrupt as error:  # before training began, or asked twice
        errors.print("Interrupted, without a new checkpoint.")
        raise typer.Exit(130) from error
    except RuntimeError as error:
        if not lost_others(error):
            raise
        lines = str(error).strip().splitlines()
        errors.print(f"A rank lost the others: {plain(lines[0] if lines else error)}", soft_wrap=True)
        raise typer.Exit(1) from error
    print_summary(console, summary)


def _say(sentence: str) -> None:
    if is_first():
        errors.print(sentence, highlight=False, soft_wrap=True)


def _report(sentence: str) -> None:
    # Sentences quote data and names, whose brackets are no styles of rich's.
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
