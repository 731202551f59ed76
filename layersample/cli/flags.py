"""Flags of the command line, made from the fields of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from layersample.config import SECTIONS, TrainConfig
from layersample.option_files import Options
from layersample.options import Role, names_with
from layersample.plugins import settings_files

_CONFIGURATION: tuple[tuple[str, Any, str], ...] = (
    ("config", Path | None, "YAML file of options; flags win over it."),
    (
        "preset",
        str | None,
        f"Options of a paper, or of a plan: {', '.join(sorted(settings_files('presets')))}.",
    ),
    ("sampler_option", list[str] | None, "KEY=VALUE for the sampler; may be repeated."),
    ("projection_option", list[str] | None, "KEY=VALUE for the projection; may be repeated."),
    ("trainer_option", list[str] | None, "KEY=VALUE for TRL's SFTConfig; may be repeated."),
)
_REPEATED = {"sampler_options", "projection_options", "trainer"}  # KEY=VALUE, above
_SHORT = {"batch_size": "--batch", "max_length": "--length", "precision": "--dtype"}


def with_options(
    *,
    role: Role | None = None,
    leave_out: Collection[str] = (),
    first: Sequence[inspect.Parameter] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that gives a command one flag for each option of a run; typer reads them from the signature.

    A flag that isn't given is ``None``, so that it doesn't win over a file.

    Args:
        role: Take only the options that play this role.
        leave_out: What gets no flag, though.
        first: Parameters of the command's own.
    """
    wanted = set(TrainConfig.model_fields) if role is None else names_with(TrainConfig, role)
    wanted -= {*_REPEATED, *leave_out}
    parameters = [
        *first,
        *(
            _flag(name, kind, text, "Configuration")
            for name, kind, text in _CONFIGURATION
            if name not in leave_out
        ),
    ]
    for section in SECTIONS:
        for name in _own_fields(section):
            if name in wanted:
                field = TrainConfig.model_fields[name]
                text = f"{field.description}{_default(field)}"
                panel = (section.__doc__ or "").strip(".")
                parameters.append(_flag(name, _flag_type(field.annotation), text, panel))

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def own_option(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    """A parameter of one command alone."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _own_fields(section: type[Options]) -> list[str]:
    """The fields of a section in the order of its file: those of the scheduler's part first."""
    bases = [base for base in reversed(section.__mro__) if issubclass(base, Options)]
    return list(dict.fromkeys(name for base in bases for name in base.model_fields))


def _flag(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    declared = f"{flag}/--no{flag[1:]}" if kind == (bool | None) else flag
    names = [declared, _SHORT[name]] if name in _SHORT else [declared]
    metavar = "KEY=VALUE" if kind == (list[str] | None) else None
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _flag_type(annotation: Any) -> Any:
    """The type that typer reads: choices as they are, text where several types will do; pydantic checks the rest."""
    kinds = [_plain(k) for k in _alternatives(annotation) if k is not type(None) and k is not object]
    if len(kinds) > 1:
        return str | None
    kind = kinds[0]
    return (kind if kind in (int, float, bool, Path) or get_origin(kind) is Literal else str) | None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    annotation = _plain(annotation)
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _default(field: FieldInfo) -> str:
    """The default in brackets; where there is none, the description says what that means."""
    if field.default is None:
        return ""
    words = {True: "on", False: "off"}
    return f" [default: {words[field.default] if isinstance(field.default, bool) else field.default}]"
