"""``layersample export`` and ``layersample apply``: what comes out of a run, and the way back to the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layersample.cli.consoles import console
from layersample.cli.quiet import quiet_libraries
from layersample.errors import ConfigError

_Output = Annotated[
    Path | None,
    typer.Option(help="What to write. Default, for a run: delta or model.gguf in its folder."),
]


def export_command(
    source: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved model.")],
    delta: Annotated[bool, typer.Option("--delta", help="Write only what trained, as safetensors.")] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write a GGUF file, by llama.cpp's converter.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="The base of a delta: built-in name, folder or hub id. Default: the run's."),
    ] = None,
    output: _Output = None,
    gguf_type: Annotated[
        str, typer.Option(help="Type of the weights in a GGUF file: auto, f32, f16, bf16, q8_0.")
    ] = "auto",
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, where it isn't on PATH.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload what is exported to the hub, as me/my-model.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Write what a run trained, or upload it to the hub.

    A delta holds only the weights that differ from the base.
    """
    if delta and gguf:
        raise ConfigError("One thing is exported at a time: choose --delta or --gguf.")
    if not (delta or gguf or push_to_hub):
        raise ConfigError(
            "What to export must be said: --delta, --gguf, or --push-to-hub for the whole model."
        )
    if base is not None and not delta:
        raise ConfigError("--base is the base of a delta: add --delta.")
    if private and not push_to_hub:
        raise ConfigError("--private is of a new repository on the hub: add --push-to-hub.")
    if not gguf and (gguf_type != "auto" or converter is not None):
        raise ConfigError("--gguf-type and --converter are of a GGUF file: add --gguf.")
    if output is not None and not (delta or gguf):
        raise ConfigError("--push-to-hub alone writes no folder: leave --output out, or add --delta.")
    if gguf and push_to_hub:
        raise ConfigError(
            "--push-to-hub uploads the model or a delta: leave --gguf out, or upload the file by `hf`."
        )
    _export(source, delta, gguf, base, output, gguf_type, converter, push_to_hub, private)


def apply_command(
    base: Annotated[str, typer.Argument(help="The base: built-in name, folder or hub id.")],
    delta: Annotated[Path, typer.Argument(help="Folder that export --delta wrote.")],
    output: Annotated[Path, typer.Option(help="Folder of the model to write.")],
) -> None:
    """Put a model together from its base and a delta, to the bit."""
    _apply(base, delta, output)


def _export(
    source: Path,
    delta: bool,
    gguf: bool,
    base: str | None,
    output: Path | None,
    gguf_type: str,
    converter: Path | None,
    push_to_hub: str | None,
    private: bool,
) -> None:
    # Seconds of imports that the other commands don't need.
    from layersample.exporting.gguf import convert, find_converter
    from layersample.exporting.hub import Hub
    from layersample.exporting.sources import find_trained

    quiet_libraries()
    trained = find_trained(source)
    written = trained.model
    script = find_converter(converter) if gguf else None
    if delta or gguf:
        written = output or _beside(trained.run, "delta" if delta else "model.gguf")
    hub = Hub(push_to_hub, private=private) if push_to_hub else None
    if script is not None:
        convert(trained.model, written, converter=script, kind=gguf_type)
    elif delta:
        _say(_write_delta(trained.model, base or trained.base, written))
    if delta or gguf:
        _say(f"Written to {written}.")
    if hub is not None:
        _say(f"Uploaded to {hub.upload(written)}.")


def _write_delta(model: Path, base: str | None, output: Path) -> str:
    from layersample.exporting.deltas import export_delta
    from layersample.exporting.names import public_name
    from layersample.training.models import fetch_folder

    if base is None:
        raise ConfigError("A delta needs the base that the model was trained from: give it with --base.")
    return export_delta(fetch_folder(base, _say), model, output, name=public_name(base)).sentence


def _apply(base: str, delta: Path, output: Path) -> None:
    from layersample.exporting.deltas import apply_delta
    from layersample.training.models import fetch_folder

    quiet_libraries()
    apply_delta(fetch_folder(base, _say), delta, output)
    _say(f"Written to {output}.")


def _beside(run: Path | None, name: str) -> Path:
    if run is None:
        raise ConfigError("A saved model has no folder of a run to write into: say where with --output.")
    return run / name


def _say(sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
