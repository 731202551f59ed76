"""The command line: layersample's own commands, and those of installed packages."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.logging import RichHandler

from layersample.cli.consoles import errors, plain
from layersample.cli.groups import Commands
from layersample.cli.launch import is_first, is_rank, tell_launcher
from layersample.errors import ConfigError, SharedError
from layersample.notices import hide_missing_kernel

# Where each command's function is, and examples for the end of its help. Help lists them in this order: that in which
# a newcomer needs them.
OWN: dict[str, tuple[str, ...]] = {
    "train": (
        "train_command:train",
        "layersample train",
        "layersample train --model ./my-model --data my.jsonl --output runs/first",
        "layersample train --output runs/first --resume",
        "layersample train --gpus 8 --shard fsdp2 --dtype bf16-mixed",
        "layersample train --sampler owlore --projection galore --embeddings freeze",
    ),
    "data": (
        "data_report:data_command",
        "layersample data my.jsonl --model ./my-model",
    ),
    "plan": (
        "plan_command:plan",
        "layersample plan llama-2-7b --preset lisa-7b",
        "layersample plan ./my-model --sampler owlore --rank 128 --budget 2GiB",
    ),
    "profile": (
        "profile_command:profile_command",
        "layersample profile smollm2-135m",
        "layersample profile ./my-model --data my.jsonl --sampler owlore",
    ),
    "list": (
        "list_command:list_command",
        "layersample list",
        "layersample list owlore",
    ),
    "chat": (
        "chat_command:chat_command",
        'layersample chat runs/first "What is 12 times 12?" --compare',
        "layersample chat runs/first",
    ),
    "export": (
        "export_command:export_command",
        "layersample export runs/first --delta",
        "layersample export runs/first --gguf",
    ),
    "apply": (
        "export_command:apply_command",
        "layersample apply smollm2-135m runs/first/delta --output whole",
    ),
    "llamafactory": (
        "llamafactory_command:llamafactory_command",
        "layersample llamafactory train run.yaml",
        "layersample llamafactory train run.yaml layersample.num_active=4",
    ),
    "env": (
        "env_command:env_command",
        "layersample env",
    ),
}


class _Layersample(Commands):
    own = OWN


app = typer.Typer(cls=_Layersample, no_args_is_help=True, rich_markup_mode=None)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"layersample {version('layersample')}")
        raise typer.Exit


@app.callback()
def layersample(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Fine-tune large models a few layers at a time."""


def main() -> None:
    """Run the command line; an error of the user's making ends it with one message and exit code 2."""
    logging.basicConfig(
        level="WARNING", format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    logging.getLogger("layersample.progress").setLevel(
        "INFO"
    )  # what a measurement reads and how long it takes
    hide_missing_kernel()
    try:
        app()
    except ConfigError as error:
        if is_first() or not isinstance(error, SharedError):
            errors.print(f"[bold red]Error:[/] {plain(error)}", highlight=False, soft_wrap=True)
        if is_rank():
            tell_launcher(error)
        _leave(2)
    except SystemExit as end:
        _leave(end.code)


def _leave(code: str | int | None) -> None:
    """Exit; a rank that failed at once, as its threads may wait for others in vain."""
    if is_rank() and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
