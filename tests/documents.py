"""The Markdown pages of the project, cut into what can be checked: blocks of code, tables, links and paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TABLE = re.compile(r"^<!-- figures: (?P<source>\S+) -->\n\n(?P<table>(?:\|.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: Path of the page, from the root.
        number: Which block of the page it is, from 0.
        language: What stands behind the fence.
        code: The text inside.
        reason: Why it isn't run: the comment ``<!-- not run: REASON -->`` in the line above; "" if it is.
    """

    page: str
    number: int
    language: str
    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str) -> list[Block]:
    """All blocks of some languages."""
    found = []
    for page in PAGES:
        for number, match in enumerate(_BLOCK.finditer(text_of(page))):
            if match["language"] in languages:
                found.append(
                    Block(name_of(page), number, match["language"], match["code"], match["reason"] or "")
                )
    return found


def commands(start: str) -> list[tuple[str, str]]:
    """Lines of shell blocks that begin so, with their page, without comments at their end."""
    found = []
    for block in blocks("sh"):
        for line in block.code.splitlines():
            if line.startswith(start):
                found.append((block.page, re.sub(r"\s+#.*$", "", line)))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", text_of(page))


def tables_with_source(page: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables that stand below ``<!-- figures: PATH -->``: the path, and the cells of each row."""
    for match in _TABLE.finditer(text_of(page)):
        yield match["source"], rows_of(match["table"])


def tables_of(page: Path) -> list[list[list[str]]]:
    """The rows of each table of a page."""
    return [rows_of(piece) for piece in text_of(page).split("\n\n") if piece.startswith("|")]


def rows_of(table: str) -> list[list[str]]:
    """The cells of each row of a Markdown table, without its two first lines."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
