"""Where commands write to: results to standard output, errors and progress to standard error."""

from __future__ import annotations

from rich.console import Console

# No ":name:" of a path or an option is an emoji.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)
