"""The command line: ``layersample list | profile | plan | train | benchmark``."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from layersample.cli.display import plain
from layersample.cli.options import own_option, with_options
from layersample.config import TrainConfig, make_config, read_preset
from layersample.errors import NEEDS_TRAIN, ConfigError, unknown
from layersample.option_files import parse_pairs, read_yaml
from layersample.plugins import COMMANDS, load_group, settings_files
from layersample.registry import (
    SAMPLERS,
    describe,
    describe_options,
    list_projections,
    list_samplers,
    load_plugin,
)

app = typer.Typer(
    help="Fine-tune large models a few layers at a time.", no_args_is_help=True, add_completion=False
)
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """Run the command line; an error of the user's making ends it with one message and exit code 2."""
    logging.basicConfig(
        level="WARNING", format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    try:
        app()
    except ConfigError as error:
        errors.print(f"[bold red]Error:[/] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command("list")
def list_command(
    name: Annotated[str | None, typer.Argument(help="A sampler or projection, to see its options.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Python file that registers samplers of your own.")
    ] = None,
) -> None:
    """Show all samplers and projections, or the options of one."""
    if plugin is not None:
        load_plugin(plugin)
    if name is None:
        for kind, classes in (("sampler", list_samplers()), ("projection", list_projections())):
            table = Table(kind, "what it does", "source", box=None, header_style="bold", pad_edge=False)
            for title, strategy in classes.items():
                table.add_row(title, plain(describe(strategy)[0].replace("``", "")), plain(strategy.source))
            console.print(table, "")
        console.print("Options of one: layersample list NAME")
        return
    known: dict[str, type[Any]] = {**list_projections(), **list_samplers()}
    cls = known.get(name)
    if cls is None:
        raise ConfigError(unknown("sampler or projection", name, known))
    first, rest = describe(cls)
    text = f"[bold]{name}[/]: {plain(first)}\n{plain(rest)}\nSource: {plain(cls.source or 'not given')}\n"
    console.print(text, highlight=False)
    table = Table("option", "type", "default", "meaning", box=None, header_style="bold")
    for option in describe_options(cls):
        table.add_row(option.name, plain(option.type), plain(option.default), plain(option.description))
    console.print(table if table.row_count else "It has no options of its own.")


@app.command("profile")
def profile_command(
    model: Annotated[str, typer.Argument(help="Built-in name, local folder or hub id.")],
    sampler: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:key=value,key=value; may be repeated.")
    ] = None,
    num_active: Annotated[int, typer.Option(min=1, help="Layers that train at a time (γ).")] = 2,
    data: Annotated[
        str | None, typer.Option(help="Calibration data, as train takes it; needed for outliers.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Calibration batches of 4 examples.")] = 8,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of an example, at most.")] = 256,
    threshold: Annotated[float, typer.Option(help="M: an outlier is above M times the layer's mean.")] = 5.0,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter of this model.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Path of the ModuleList of layers, if it can't be found.")
    ] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Python file that registers samplers of your own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for profile.json, .csv and .png.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep the table's spectral metrics on disk.")] = True,
) -> None:
    """Show what the weights of a model say of each layer, and how likely each sampler is to train it."""
    # Seconds of imports that the other commands don't need.
    from transformers.utils import logging as transformers_logging

    from layersample.cli.profile_report import ProfileProgress, print_profile, write_profile
    from layersample.profiling.profile import profile
    from layersample.training.batches import make_batches
    from layersample.training.models import load_any_model, resolve_model

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if plugin is not None:
        load_plugin(plugin)
    chosen = [_parse_sampler(text) for text in sampler or _compared_samplers(with_data=data is not None)]
    for name, _ in chosen:
        SAMPLERS.get(name)  # a misspelt one is told before the model loads
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"The output folder must be writable, but: {error}.") from error
    loaded = load_any_model(model, console.print)
    calibration = None
    if data is not None:
        calibration = make_batches(loaded, resolve_model(model), data, count=batches, max_length=max_length)
    with ProfileProgress(console) as progress:
        measured = profile(
            loaded,
            samplers=chosen,
            num_active=num_active,
            batches=calibration,
            threshold=threshold,
            adapter=adapter,
            layers=layers,
            cache=cache,
            progress=progress,
        )
    print_profile(console, measured)
    if output is not None:
        written = ", ".join(write_profile(output, measured, model))
        console.print(f"Written to {plain(output)}: {written}", highlight=False, soft_wrap=True)


def _compared_samplers(*, with_data: bool) -> list[str]:
    compared = yaml.safe_load(settings_files("comparisons")["profile"])
    samplers: list[str] = compared["with_data" if with_data else "without_data"]
    return samplers


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
    _run(_settings(config, preset, sampler_option, projection_option, trainer_option, flags))


def plan(
    *,
    model: str,
    gpus: int = 1,
    as_json: bool = False,
    picture: Path | None = None,
    baselines: bool = True,
    config: Path | None = None,
    preset: str | None = None,
    sampler_option: list[str] | None = None,
    projection_option: list[str] | None = None,
    **flags: Any,
) -> None:
    """Show the peak memory of a run before it is run; no GPU and no weights are needed."""
    # Seconds of imports that the other commands don't need.
    import json

    from transformers.utils import logging as transformers_logging

    from layersample.cli.plan_report import print_plan
    from layersample.planning.planner import plan as plan_run
    from layersample.plots import plot_plan

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    settings = _settings(config, preset, sampler_option, projection_option, None, {**flags, "model": model})
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    planned = plan_run(model, settings, gpus=gpus, baselines=baselines)
    if picture is not None:
        plot_plan(picture, planned.to_json(), f"{model}, bytes at the peak")
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
    else:
        print_plan(console, planned)


def _settings(
    config: Path | None,
    preset: str | None,
    sampler_option: list[str] | None,
    projection_option: list[str] | None,
    trainer_option: list[str] | None,
    flags: dict[str, Any],
) -> TrainConfig:
    """All options from a stored run, a preset, a file and the command line; later ones win."""
    given = {key: value for key, value in flags.items() if value is not None}
    sources: list[tuple[str, dict[str, Any]]] = []
    if given.get("resume") and (stored := Path(given.get("output") or "") / "config.yaml").is_file():
        sources.append((str(stored), read_yaml(stored)))
    if preset is not None:
        sources.append((f"preset {preset}", read_preset(preset)))
    if config is not None:
        sources.append((str(config), read_yaml(config)))
    for key, pairs in (
        ("sampler_options", sampler_option),
        ("projection_options", projection_option),
        ("trainer", trainer_option),
    ):
        if pairs:
            base: dict[str, Any] = {}
            for _, options in sources:
                base = options.get(key, base)
            given[key] = {**base, **parse_pairs(pairs, key)}
    return make_config(*sources, ("command line", given))


def _run(settings: TrainConfig) -> None:
    # Seconds of imports that the other commands don't need.
    try:
        import datasets
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Training {NEEDS_TRAIN}") from error
    from transformers.utils import logging as transformers_logging

    from layersample.cli.display import LiveProgress, print_config, print_summary
    from layersample.training.finetune import finetune
    from layersample.training.trainer import Interrupted, NonFiniteLossError

    # What the libraries say to each other about their own next versions is nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print_config(console, settings)
    try:
        summary = finetune(settings, progress=LiveProgress(console), report=console.print)
    except NonFiniteLossError as error:
        errors.print(f"[bold red]Stopped:[/] {plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except Interrupted as error:
        errors.print(
            f"Interrupted. A checkpoint is in {error.checkpoint}; continue with: layersample train "
            f"--output {error.checkpoint.parent.parent} --resume",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + error.signal_number) from error
    except KeyboardInterrupt as error:  # before training began, or asked twice
        errors.print("Interrupted, without a new checkpoint.")
        raise typer.Exit(130) from error
    print_summary(console, summary)


def _parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """Split NAME:key=value,key=value; a comma inside of a value (a list) doesn't end it."""
    name, _, options = text.partition(":")
    pairs = re.split(r",(?=\w+=)", options) if options else []
    return name, parse_pairs(pairs, f"an option of sampler {name!r}")


_PLAN_OPTIONS = (
    own_option(
        "model",
        str,
        inspect.Parameter.empty,
        typer.Argument(help="Built-in shape, folder or hub id; an unknown name lists the shapes."),
    ),
    own_option("gpus", int, 1, typer.Option(min=1, help="GPUs that the run is sharded over (FSDP).")),
    own_option("as_json", bool, False, typer.Option("--json", help="Print JSON; sizes are bytes.")),
    own_option("picture", Path | None, None, typer.Option(help="PNG of stacked bars to write.")),
    own_option("baselines", bool, True, typer.Option(help="Plan the usual ways to train as well.")),
)
# Options that change nothing in a step's memory.
_NOT_PLANNED = (
    *(
        "model",
        "check",
        "save_precision",
        "data",
        "eval_data",
        "eval_size",
        "steps",
        "epochs",
        "learning_rate",
    ),
    *(
        "schedule",
        "warmup",
        "weight_decay",
        "output",
        "save_steps",
        "resume",
        "overwrite",
        "verify",
        "trainer_option",
    ),
    *("sampler_options", "projection_options"),
)
app.command(rich_help_panel=None)(with_options(plan, leave_out=_NOT_PLANNED, first=_PLAN_OPTIONS))
app.command(rich_help_panel=None)(with_options(train))
for _name, _command in load_group(COMMANDS).items():
    app.add_typer(_command, name=_name)
if __name__ == "__main__":
    main()
