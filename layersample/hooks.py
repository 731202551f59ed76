"""Whose hooks are on a module or an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_LIBRARIES = ("layersample.", "torch.", "accelerate.")
"""Whose own hooks (FSDP's, for one) look at no values, or at those that they are meant to."""


def name_of(hook: Callable[..., Any]) -> str:
    """A hook's name with its module in front; that of its type for an object that is called."""
    while isinstance(hook, partial):
        hook = hook.func
    named = hook if hasattr(hook, "__qualname__") or hasattr(hook, "__func__") else type(hook)
    return f"{named.__module__}.{named.__qualname__}"


def is_users(hook: Callable[..., Any]) -> bool:
    """Whether a hook is neither ours nor one of torch or accelerate."""
    return not name_of(hook).startswith(_LIBRARIES)
