"""Warnings that are said once about one object, however often what they are about is looked at."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

_SAID: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(logger: logging.Logger, about: object, message: str, *args: object) -> None:
    """Log a warning, unless the same words have been said about the same object.

    Args:
        logger: Logger of the module that warns.
        about: What it is about, a model say; it isn't kept alive.
        message: The words, with ``%s`` where ``args`` go.
        args: What goes there.
    """
    said = _SAID.setdefault(about, set())
    text = message % args if args else message
    if text not in said:
        said.add(text)
        logger.warning(message, *args)
