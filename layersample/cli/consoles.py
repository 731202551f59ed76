"""Where commands write to: results to standard output, errors and progress to standard error."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

# No ":name:" of a path or an option is an emoji.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def plain(text: object) -> str:
    """Text that rich shows as it is, brackets and all."""
    return escape(str(text))
