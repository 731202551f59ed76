"""Flags of the command line, made from the fields of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from layersample.config import SECTIONS
from layersample.plugins import settings_files

_PRESETS = sorted(settings_files("presets"))
_CONFIGURATION: list[tuple[str, Any, str]] = [
    ("config", Path | None, "YAML file of options; flags win over it."),
    ("preset", str | None, f"Options of a paper, or of a plan: {', '.join(_PRESETS)}."),
    ("sampler_option", list[str] | None, "KEY=VALUE for the sampler; may be repeated."),
    ("projection_option", list[str] | None, "KEY=VALUE for the projection; may be repeated."),
    ("trainer_option", list[str] | None, "KEY=VALUE for TRL's SFTConfig; may be repeated."),
]
_SHORT = {"batch_size": "--batch", "max_length": "--length", "precision": "--dtype"}


def with_options(
    function: Callable[..., None],
    *,
    leave_out: Collection[str] = ("sampler_options", "projection_options"),
    first: Sequence[inspect.Parameter] = (),
) -> Callable[..., None]:
    """Give a command one flag for each field of the configuration; typer reads them from the signature.

    A flag that isn't given is ``None``, so that it doesn't win over a file.

    Args:
        function: The command.
        leave_out: Fields without a flag.
        first: Parameters of the command's own.
    """
    parameters = [
        *first,
        *(
            _flag(name, kind, text, "Configuration")
            for name, kind, text in _CONFIGURATION
            if name not in leave_out
        ),
    ]
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            if name not in leave_out:
                text = f"{field.description} [dim]\\[default: {_default(field)}][/]"
                panel = (section.__doc__ or "").strip(".")
                parameters.append(_flag(name, _flag_type(field.annotation), text, panel))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _flag(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    declared = f"{flag}/--no{flag[1:]}" if kind == (bool | None) else flag
    names = [declared, _SHORT[name]] if name in _SHORT else [declared]
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def own_option(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    """A parameter of one command alone."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _flag_type(annotation: Any) -> Any:
    """The type that typer reads: choices as they are, everything else checked by pydantic."""
    kinds = [k for k in get_args(annotation) if k is not type(None)]
    kind = kinds[0] if get_origin(annotation) in (Union, UnionType) else annotation
    return (kind if kind in (int, float, bool, Path) or get_origin(kind) is Literal else str) | None


def _default(field: FieldInfo) -> str:
    return "none" if field.default is None else str(field.default)
