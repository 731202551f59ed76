"""Errors of the user's making, said so that the user can mend them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

_Sortable = TypeVar("_Sortable", int, str)

NEEDS_TRAIN = 'needs the train extra: pip install "layersample[train]".'


class ConfigError(ValueError):
    """A configuration, option or file that can't be used: says what must hold, what came and what to do."""


class SharedError(ConfigError):
    """One that all ranks of a run raise alike, so that one of them tells it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence on an unknown name: the closest ones first, then all there are."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{hint} There {'are' if len(names) != 1 else 'is'}: {', '.join(names) or 'none'}."


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more


def repeated(values: Iterable[_Sortable]) -> list[_Sortable]:
    """Those of some values that come several times, each once, in order."""
    return sorted(value for value, times in Counter(values).items() if times > 1)


def text_fault(text: str) -> str | None:
    """What keeps a text from being stored or printed, in words; ``None`` where nothing does."""
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half of a character (a lone surrogate)"
    return None


def first_line(error: Exception) -> str:
    """What other people's code ended with: the error's type, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def short(value: object, limit: int = 60) -> str:
    """A value for a message, on one line: its representation, cut where it is long."""
    text = repr(value[: 2 * limit] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
