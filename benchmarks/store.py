"""How a benchmark shows and stores its figures: a table on the screen, NAME.json and NAME.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from layersample.cli.consoles import console
from layersample.environment import describe_processor, environment
from layersample.files import write_json, write_text

_STORED = Path(__file__).parent / "results"
RESULTS = _STORED if _STORED.is_dir() else Path("results")  # an installed package holds none


def store(
    output: Path,
    name: str,
    figures: dict[str, Any],
    *,
    title: str,
    about: str,
    command: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
) -> None:
    """Print a table, and store it with the command and the machine.

    Args:
        output: The folder.
        name: Name of both files.
        figures: All that was measured, for the JSON.
        title: Heading of the Markdown.
        about: What was measured, on what, in sentences.
        command: What a user types to have it again, behind ``python -m layersample_benchmarks.``.
        headings: Headings of the table's columns.
        rows: The table's cells.
        notes: Sentences below the table.
    """
    machine = environment()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", {**figures, "environment": machine})
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines = [
        f"# {title}",
        "",
        about,
        f"`python -m layersample_benchmarks.{command}` on {describe_processor(machine)}, "
        f"{machine['threads']} threads, Python {machine['python']}, {versions}.",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
    ]
    write_text(output / f"{name}.md", "\n".join(lines))
    table = Table(*headings, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print("-", note, highlight=False)
