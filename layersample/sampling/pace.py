"""How long a measurement will take: said while it begins, so that nobody waits in silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Say = Callable[[str], None]

PROGRESS = logging.getLogger("layersample.progress")
"""Where measurements say what they do where nobody else is told; the command line shows it."""


def paced(items: Iterable[Item], what: str, count: int, say: Say) -> Iterator[Item]:
    """Give items to a loop, and say before the first one how many there may be, and after it how long the rest takes.

    Args:
        items: What the loop works on; at most ``count`` of them are given.
        what: What the loop does, in a few words.
        count: Most items.
        say: Where it is said.
    """
    say(f"{what}: up to {count}.")
    began = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        if number == 1 and count > 1:
            took = time.perf_counter() - began
            say(
                f"{what}: the first took {took:.1f} s, the other {count - 1} may take {took * (count - 1):.0f} s."
            )
        if number == count:
            return


def pace(what: str, say: Say) -> Callable[[int, int], None]:
    """A progress callback that says, once a tenth is done, how long the rest takes."""
    began, said = time.perf_counter(), False

    def progress(done: int, total: int) -> None:
        nonlocal said
        if not said and 10 * done >= total > done:
            said = True
            left = (time.perf_counter() - began) / done * (total - done)
            say(f"{what}: {done} of {total} are done, the rest may take {left:.0f} s.")

    return progress
