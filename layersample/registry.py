"""Names for samplers: the built-in ones, those of installed packages, and those in a user's own file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import docstring_parser
from pydantic import ConfigDict, ValidationError, create_model

from layersample.errors import ConfigError, unknown
from layersample.sampler import LayerSampler

_samplers: dict[str, type[LayerSampler]] = {}
_Class = TypeVar("_Class", bound=type[LayerSampler])


@dataclass(frozen=True)
class Option:
    """One option of a sampler: its name, type and default as text, and what its docstring says of it."""

    name: str
    type: str
    default: str
    description: str


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that gives a sampler the name by which configurations and commands choose it.

    Args:
        name: The name; no other class may have it. The same class may come again (a notebook cell run twice).

    Raises:
        TypeError: If the class is no :class:`LayerSampler`.
        ValueError: If another class has the name.
    """

    def decorate(cls: _Class) -> _Class:
        if not (inspect.isclass(cls) and issubclass(cls, LayerSampler)):
            raise TypeError(f"@register({name!r}) must decorate a subclass of LayerSampler, but got {cls!r}.")
        other = _samplers.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The sampler name {name!r} is taken by {other.__module__}.{other.__qualname__}; choose another one."
            )
        _samplers[name] = cls
        return cls

    return decorate


def list_samplers() -> dict[str, type[LayerSampler]]:
    """All samplers by name, sorted; those of installed packages are loaded by the first call."""
    _load_entry_points()
    return dict(sorted(_samplers.items()))


def get_sampler(name: str) -> type[LayerSampler]:
    """The class behind a name.

    Raises:
        ConfigError: If there is no sampler of that name; it lists the names and the closest one.
    """
    samplers = list_samplers()
    if name not in samplers:
        raise ConfigError(unknown("sampler", name, samplers))
    return samplers[name]


def create_sampler(name: str, options: Mapping[str, Any] | None = None) -> LayerSampler:
    """Make a sampler from its name and options.

    Args:
        name: A name that :func:`list_samplers` knows.
        options: Constructor arguments by name; checked against the constructor's annotations.

    Raises:
        ConfigError: If the name or an option is unknown, or a value has the wrong type or is out of bounds.
    """
    cls = get_sampler(name)
    options = dict(options or {})
    known = _parameters(cls)
    for option in options:
        if option not in known:
            raise ConfigError(unknown(f"option of sampler {name!r}", option, known))
    hints = get_type_hints(cls.__init__, include_extras=True)
    # Pydantic checks and converts, as for the rest of the configuration: "0.5" from a command line is a number.
    fields: dict[str, Any] = {
        key: (hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in known.items()
    }
    schema = create_model("Options", __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
    try:
        checked = schema(**options)
        return cls(**{key: getattr(checked, key) for key in options})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"Option {key!r} of sampler {name!r}: {first['msg']}, but got {first['input']!r}."
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Sampler {name!r}: {error}") from error


def describe_options(cls: type[LayerSampler]) -> list[Option]:
    """The options of a sampler, as its constructor and docstring give them."""
    hints = get_type_hints(cls.__init__)
    # An inherited option is documented where it comes from.
    documented = {
        p.arg_name: p.description or ""
        for base in reversed(cls.__mro__)
        for p in docstring_parser.parse(base.__doc__ or "").params
    }
    return [
        Option(
            name=key,
            type=inspect.formatannotation(hints.get(key, parameter.annotation)).replace("typing.", ""),
            default="required" if parameter.default is parameter.empty else repr(parameter.default),
            description=" ".join(documented.get(key, "").split()).replace("``", ""),
        )
        for key, parameter in _parameters(cls).items()
    ]


def describe(cls: type[LayerSampler]) -> tuple[str, str]:
    """The first line of a sampler's docstring, and what follows it up to the options."""
    parsed = docstring_parser.parse(inspect.getdoc(cls) or "")
    return parsed.short_description or "", (parsed.long_description or "").replace("``", "")


def load_plugin(path: str | Path) -> ModuleType:
    """Run a user's Python file, so that its ``@register`` lines take effect.

    Args:
        path: A ``.py`` file.

    Raises:
        ConfigError: If there is no such file, or it raises; the error names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"The plug-in file must exist, but there is no file {str(path)!r}.")
    name = f"layersample_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"A plug-in must be a Python file (.py), but got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise ConfigError(
            f"The plug-in {path}, line {line}, raised {type(error).__name__}: {error}"
        ) from error
    return module


def _parameters(cls: type[LayerSampler]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group="layersample.samplers"):
        entry.load()
