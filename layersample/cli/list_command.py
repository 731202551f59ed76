"""``layersample list``: every sampler, projection and preset, or the options of one."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from layersample.cli.consoles import console, plain
from layersample.errors import ConfigError, unknown
from layersample.plugins import settings_files


def list_command(
    name: Annotated[str | None, typer.Argument(help="A sampler or projection, to see its options.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Python file that registers samplers of your own.")
    ] = None,
) -> None:
    """Show samplers, projections and presets, or options of one."""
    with _no_collection():
        _show(name, plugin)


def _show(name: str | None, plugin: Path | None) -> None:
    from layersample.registry import describe, describe_options, list_projections, list_samplers, load_plugin

    if plugin is not None:
        load_plugin(plugin)
    if name is None:
        for kind, classes in (("sampler", list_samplers()), ("projection", list_projections())):
            table = Table(kind, "what it does", "source", box=None, header_style="bold", pad_edge=False)
            for title, strategy in classes.items():
                table.add_row(title, plain(describe(strategy)[0].replace("``", "")), plain(strategy.source))
            console.print(table, "")
        table = Table("preset", "what it is", box=None, header_style="bold", pad_edge=False)
        for title, text in sorted(settings_files("presets").items()):
            table.add_row(title, plain(text.partition("\n")[0].lstrip("# ")))
        console.print(table, "")
        console.print("Options of a sampler or projection: layersample list NAME")
        return
    known: dict[str, type[Any]] = {**list_projections(), **list_samplers()}
    cls = known.get(name)
    if cls is None:
        raise ConfigError(unknown("sampler or projection", name, known))
    first, rest = describe(cls)
    text = f"[bold]{name}[/]: {plain(first)}\n{plain(_rewrapped(rest))}\nSource: {plain(cls.source or 'not given')}\n"
    console.print(text, highlight=False)
    table = Table("option", "type", "default", "meaning", box=None, header_style="bold")
    for option in describe_options(cls):
        table.add_row(option.name, plain(option.type), plain(option.default), plain(option.description))
    console.print(table if table.row_count else "It has no options of its own.")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave garbage where it is: there is next to none, but to look for it among all that torch makes takes .2 s."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rewrapped(text: str) -> str:
    """A docstring's paragraphs, a line each for the terminal to wrap; formulas, which are indented, as they are."""
    blocks = re.split(r"\n{2,}", text)
    return "\n".join(block if block.startswith(" ") else " ".join(block.split()) for block in blocks)
