"""``layersample train``: fine-tune a model, a few layers at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from layersample.cli.consoles import console, errors
from layersample.cli.display import plain
from layersample.cli.quiet import quiet_libraries
from layersample.cli.settings import gather_settings
from layersample.config import TrainConfig
from layersample.errors import NEEDS_TRAIN, ConfigError


def train(
    *,
    config: Path | None = None,
    preset: str | None = None,
    sampler_option: list[str] | None = None,
    projection_option: list[str] | None = None,
    trainer_option: list[str] | None = None,
    **flags: Any,
) -> None:
    """Fine-tune a model, a few layers at a time.

    Without options: SmolLM2-135M on grade-school problems with LISA, about three minutes on two cores.
    """
    _run(gather_settings(config, preset, sampler_option, projection_option, trainer_option, flags))


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
    print_config(console, settings)
    try:
        summary = finetune(settings, progress=LiveProgress(console), report=_report)
    except NonFiniteLossError as error:
        errors.print(f"[bold red]Stopped:[/] {plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except Interrupted as error:
        again = f" --plugin {settings.plugin}" if settings.plugin else ""
        errors.print(
            f"Interrupted. A checkpoint is in {error.checkpoint}; continue with: layersample train "
            f"--output {error.checkpoint.parent.parent} --resume{again}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + error.signal_number) from error
    except KeyboardInterrupt as error:  # before training began, or asked twice
        errors.print("Interrupted, without a new checkpoint.")
        raise typer.Exit(130) from error
    print_summary(console, summary)


def _report(sentence: str) -> None:
    # Sentences quote data and names, whose brackets are no styles of rich's.
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
