"""Names for samplers and projections: the built-in ones, those of installed packages, and a user's own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, get_type_hints

import docstring_parser
from pydantic import ConfigDict, ValidationError, create_model

from layersample.errors import ConfigError, unknown
from layersample.plugins import SAMPLERS as SAMPLER_GROUP
from layersample.plugins import load_group
from layersample.projection.projection import Projection
from layersample.sampling.sampler import LayerSampler

_Kind = TypeVar("_Kind")
_Class = TypeVar("_Class", bound=type[Any])
PLUGIN_PREFIX = "layersample_plugin_"  # of the names under which users' files are imported


@dataclass(frozen=True)
class Option:
    """One option of a strategy: its name, type and default as text, and what its docstring says of it."""

    name: str
    type: str
    default: str
    description: str


class Registry(Generic[_Kind]):
    """Names of one kind of strategy.

    Args:
        kind: What it is called in messages.
        base: The class that all of them extend.
    """

    def __init__(self, kind: str, base: type[_Kind]) -> None:
        self._kind, self._base = kind, base
        self.classes: dict[str, type[_Kind]] = {}

    def register(self, name: str) -> Callable[[_Class], _Class]:
        """Class decorator that gives a strategy the name by which configurations and commands choose it.

        Args:
            name: The name; no other class may have it. The same class may come again (a notebook cell run twice).

        Raises:
            TypeError: If the class isn't of this kind.
            ValueError: If another class has the name.
        """

        def decorate(cls: _Class) -> _Class:
            if not (inspect.isclass(cls) and issubclass(cls, self._base)):
                raise TypeError(
                    f"A {self._kind} ({name!r}) must be a subclass of {self._base.__name__}, but got {cls!r}."
                )
            other = self.classes.get(name)
            if other is not None and _identity(other) != _identity(cls):
                raise ValueError(
                    f"The {self._kind} name {name!r} is taken by {'.'.join(_identity(other))}; choose another one."
                )
            self.classes[name] = cls
            return cls  # type: ignore[return-value]

        return decorate

    def list(self) -> dict[str, type[_Kind]]:
        """All by name, sorted; those of installed packages are loaded by the first call."""
        load_group(SAMPLER_GROUP)
        return dict(sorted(self.classes.items()))

    def get(self, name: str) -> type[_Kind]:
        """The class behind a name.

        Raises:
            ConfigError: If there is none of that name; it lists the names and the closest one.
        """
        classes = self.list()
        if name not in classes:
            raise ConfigError(unknown(self._kind, name, classes))
        return classes[name]

    def create(self, name: str, options: Mapping[str, Any] | None = None) -> _Kind:
        """Make a strategy from its name and options.

        Args:
            name: A name that :meth:`list` knows.
            options: Constructor arguments by name; checked against their annotations.

        Raises:
            ConfigError: If the name or an option is unknown, or a value has the wrong type or is out of bounds.
        """
        cls = self.get(name)
        options = dict(options or {})
        known = _parameters(cls)
        for option in options:
            if option not in known:
                raise ConfigError(unknown(f"option of {self._kind} {name!r}", option, known))
        hints = _hints(cls)
        # Pydantic checks and converts, as for the rest of the configuration: "0.5" from a command line is a number.
        fields: dict[str, Any] = {
            key: (hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default)
            for key, parameter in known.items()
        }
        schema = create_model("Options", __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
        try:
            checked = schema(**options)
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            # Where several types would do, each says what it wants.
            wanted = dict.fromkeys(e["msg"] for e in error.errors() if e["loc"][0] == key)
            raise ConfigError(
                f"Option {key!r} of {self._kind} {name!r}: {', or: '.join(wanted)}, but got {options[key]!r}."
                if key in options
                else f"{self._kind.capitalize()} {name!r} needs the option {key!r}."
            ) from error
        try:
            return cls(**{key: getattr(checked, key) for key in options})
        except (
            ValueError
        ) as error:  # how a constructor refuses an option; what else it raises is a fault of its own
            raise ConfigError(f"{self._kind.capitalize()} {name!r}: {error}") from error
        except Exception as error:
            error.add_note(f"raised by the constructor of {self._kind} {name!r} ({'.'.join(_identity(cls))})")
            raise

    def resolve(self, strategy: str | _Kind, options: Mapping[str, Any] | None = None) -> tuple[_Kind, str]:
        """The strategy that is meant by a name or by itself, and what it is called.

        Raises:
            ConfigError: As :meth:`create`; or if options come with a strategy that is made already.
        """
        if isinstance(strategy, str):
            return self.create(strategy, options), strategy
        if options:
            raise ConfigError(
                f"{self._kind}_options go with a {self._kind}'s name; give them to the {self._kind} itself."
            )
        if not isinstance(strategy, self._base):
            raise ConfigError(
                f"A {self._kind} must be a name or a {self._base.__name__}, but got {strategy!r}."
            )
        return strategy, type(strategy).__name__

    def resolve_optional(
        self, strategy: str | _Kind | None, options: Mapping[str, Any] | None = None
    ) -> tuple[_Kind, str] | tuple[None, None]:
        """As :meth:`resolve`, where there may be none.

        Raises:
            ConfigError: As :meth:`resolve`; or if there are options, but nothing that they are for.
        """
        if strategy is not None:
            return self.resolve(strategy, options)
        if options:
            raise ConfigError(f"{self._kind}_options need a {self._kind}, but there is none: name one.")
        return None, None


SAMPLERS: Registry[LayerSampler] = Registry("sampler", LayerSampler)  # type: ignore[type-abstract]
PROJECTIONS: Registry[Projection] = Registry("projection", Projection)  # type: ignore[type-abstract]
register = register_sampler = SAMPLERS.register
create_sampler, list_samplers = SAMPLERS.create, SAMPLERS.list
register_projection, create_projection, list_projections = (
    PROJECTIONS.register,
    PROJECTIONS.create,
    PROJECTIONS.list,
)


def describe_options(cls: type[Any]) -> list[Option]:
    """The options of a strategy, as its constructor and docstring give them; its own before those it inherits."""
    hints = _hints(cls)
    parameters = _parameters(cls)
    own = [key for base in cls.__mro__ for key in vars(base).get("__annotations__", ()) if key in parameters]
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
        for key, parameter in ((key, parameters[key]) for key in dict.fromkeys([*own, *parameters]))
    ]


def describe(cls: type[Any]) -> tuple[str, str]:
    """The first line of a strategy's docstring, and what follows it up to the options."""
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
    name = f"{PLUGIN_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"A plug-in must be a Python file (.py), but got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    registries: tuple[Registry[Any], ...] = (SAMPLERS, PROJECTIONS)
    before = [(names, dict(names.classes)) for names in registries]
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # as sys.exit(0), which would end the command as if all were well
        # What it registered up to there must not stay: it would take the names when the mended file comes.
        del sys.modules[name]
        for names, classes in before:
            names.classes.clear()
            names.classes.update(classes)
        if isinstance(error, KeyboardInterrupt):
            raise
        file = str(module.__file__)  # absolute, as in the traceback
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = (getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None) or (
            lines[-1] if lines else "?"
        )
        what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else _raised(error)
        raise ConfigError(f"The plug-in {path}, line {line}, {what}") from error
    return module


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}"


def _identity(cls: type[Any]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _hints(cls: type[Any]) -> dict[str, Any]:
    """The type of each option, whether it is a dataclass's field or an argument of a constructor of its own.

    Raises:
        ConfigError: If an annotation names something that isn't there.
    """
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    # A generated constructor knows the names in its own module only, and its bases' fields may be of another.
    generated = set(_parameters(cls)) <= set(vars(owner).get("__dataclass_fields__", ()))
    try:
        hints = get_type_hints(cls if generated else cls.__init__, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"The options of {'.'.join(_identity(cls))} must have annotations that can be looked up, but: {error}."
        ) from error
    return {key: hint.type if isinstance(hint, InitVar) else hint for key, hint in hints.items()}
