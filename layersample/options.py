"""What an option is: a field with a default, bounds, a description, and the roles that it plays."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

MOST = 10**9
"""The largest count: a product of two such counts is still a size that torch takes."""


class Role(StrEnum):
    """What an option matters to. Whoever needs a list of options asks for a role, so there is one list alone."""

    IDENTITY = "identity"
    """A run must be resumed with the value that it was begun with."""

    MEMORY = "memory"
    """It changes what a step holds, and so what a plan says."""

    SHOWN = "shown"
    """It is printed before each run, whether it was given or not."""

    SUITE = "suite"
    """A benchmark sets it itself, so that every method has the same."""


def option(default: Any, description: str, *roles: Role, **bounds: Any) -> Any:
    """A field of a set of options.

    Args:
        default: Its default; ``None`` is off, or follows from something else that the description names.
        description: What it is, with its unit, as the command line's help prints it.
        roles: What it matters to.
        bounds: Bounds of a number, as pydantic names them: ``ge``, ``gt``, ``le``, ``lt``.
    """
    return Field(default, description=description, json_schema_extra={"roles": list(roles)}, **bounds)


def names_with(options: type[BaseModel], role: Role) -> frozenset[str]:
    """Names of the options that play a role."""
    return frozenset(name for name, field in options.model_fields.items() if role in _roles(field))


def _roles(field: FieldInfo) -> Collection[str]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    roles: Any = extra["roles"]
    return roles  # type: ignore[no-any-return]
