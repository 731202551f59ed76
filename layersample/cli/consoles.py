"""Where commands write to: results to standard output, errors and progress to standard error."""

from __future__ import annotations

from rich.console import Console

console = Console()
errors = Console(stderr=True)
