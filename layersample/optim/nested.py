"""Tensors inside of an optimizer's state, however deep: in lists, dictionaries, and attributes of objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def map_tensors(value: Any, move: Callable[[Tensor], Tensor], seen: set[int] | None = None) -> Any:
    """Put what a function makes of each tensor in its place.

    Args:
        value: A part of an optimizer's state. Lists, dictionaries and objects are changed in place, since an optimizer
            may hold them elsewhere as well; tuples are made anew. Parameters, which aren't state, are left alone.
        move: Gives a tensor for each.
        seen: Identities of what has been looked into; objects may hold each other.

    Returns:
        The value, or what takes its place.
    """
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else move(value)
    seen = set() if seen is None else seen
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        items = [map_tensors(item, move, seen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        value[:] = [map_tensors(item, move, seen) for item in value]
        return value
    named = value if isinstance(value, dict) else vars(value) if _has_attributes(value) else {}
    for key in list(named):
        named[key] = map_tensors(named[key], move, seen)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a part of an optimizer's state."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    yield from found


def opaque_in(value: Any) -> Iterator[str]:
    """Kinds of objects in a part of an optimizer's state that can't be looked into, and may hold tensors."""
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    elif isinstance(value, (Tensor, *_PLAIN)) or _has_attributes(value) or callable(value):
        return
    elif type(value).__module__.partition(".")[0] in ("torch", "numpy"):  # a type, a device, a generator
        return
    else:
        yield type(value).__qualname__
        return
    for item in items:
        yield from opaque_in(item)


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object with attributes of its own, and not a class or a function."""
    return hasattr(value, "__dict__") and not callable(value)
