"""``layersample profile``: what the weights of a model say of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from layersample.choices import Granularity
from layersample.cli.consoles import console, plain
from layersample.cli.quiet import quiet_libraries
from layersample.cli.settings import parse_sampler
from layersample.errors import ConfigError
from layersample.files import check_output
from layersample.plugins import settings_files


def profile_command(
    model: Annotated[str, typer.Argument(help="Built-in name, local folder or hub id.")],
    sampler: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:key=value,key=value; may be repeated.")
    ] = None,
    num_active: Annotated[int, typer.Option(min=1, max=10**9, help="Layers that train at a time (γ).")] = 2,
    granularity: Annotated[
        Granularity, typer.Option(help="What is measured and sampled as one: whole layers, or parts of them.")
    ] = "layer",
    data: Annotated[
        str | None, typer.Option(help="Calibration data, as train takes it; needed for outliers.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=10**9, help="Calibration batches of 4 examples.")] = 8,
    max_length: Annotated[int, typer.Option(min=8, max=10**9, help="Tokens of an example, at most.")] = 256,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e9,
            help="M: an outlier is above M times the layer's mean; by default that of the first sampler that counts "
            "them, or 5.",
        ),
    ] = None,
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
    """Show what the weights of a model say of each layer.

    Beside it: how likely each sampler is to train the layer.
    """
    # Seconds of imports that the other commands don't need.
    from layersample.cli.profile_report import ProfileProgress, print_profile, write_profile
    from layersample.profiling.profile import profile
    from layersample.registry import SAMPLERS, load_plugin
    from layersample.training.batches import make_batches
    from layersample.training.models import load_any_model, resolve_model

    quiet_libraries(reads_data=data is not None)
    if plugin is not None:
        load_plugin(plugin)
    chosen = [parse_sampler(text) for text in sampler or _compared_samplers(with_data=data is not None)]
    for name, options in chosen:  # a misspelt one is told before the model loads
        if SAMPLERS.create(name, options).needs_batches and data is None:
            raise ConfigError(
                f"The sampler {name!r} measures with calibration data: give --data FILE, or options with which it "
                f"needs none (layersample list {name})."
            )
    if output is not None:
        check_output(output)
    loaded = load_any_model(model, console.print)
    calibration = None
    if data is not None:
        calibration = make_batches(loaded, resolve_model(model), data, count=batches, max_length=max_length)
    with ProfileProgress(console) as progress:
        measured = profile(
            loaded,
            samplers=chosen,
            num_active=num_active,
            granularity=granularity,
            batches=calibration,
            threshold=threshold,
            adapter=adapter,
            layers=layers,
            cache=cache,
            progress=progress,
        )
    print_profile(console, measured)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        written = ", ".join(write_profile(output, measured, model))
        console.print(f"Written to {plain(output)}: {written}", highlight=False, soft_wrap=True)


def _compared_samplers(*, with_data: bool) -> list[str]:
    compared = yaml.safe_load(settings_files("comparisons")["profile"])
    samplers: list[str] = compared["with_data" if with_data else "without_data"]
    return samplers
