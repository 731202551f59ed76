"""Show and store a profile: the table and the files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from layersample.cli.consoles import plain
from layersample.environment import environment
from layersample.errors import ConfigError
from layersample.files import write_json, write_text
from layersample.plots import plot_profile
from layersample.profiling.profile import Profile

_COLUMNS = (
    ("alpha", "alpha", "{:.3f}"),
    ("hill", "Hill", "{:.3f}"),
    ("stable_rank", "stable\nrank", "{:.1f}"),
    ("outlier_percent", "outliers\n%", "{:.3f}"),
    ("lora_ratio", "LoRA\nratio", "{:.2e}"),
)


_WIDE = 100  # columns of a terminal that has room for the scores of several samplers


class ProfileProgress:
    """A bar for each part of the measurement; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal, transient=True)

    def __enter__(self) -> ProfileProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Move one bar."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)


def print_profile(console: Console, profile: Profile) -> None:
    """Print the table, a row a layer, and the notes below it. Columns without any value are left out."""
    rows = profile.to_rows()
    prefix = _common_prefix([row["layer"] for row in rows])
    if prefix:  # said once, so that the table fits a terminal of 80 columns
        console.print(f"{profile.granularity.title()}s: {plain(prefix)}*\n", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(profile.granularity, no_wrap=True)
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    for title in ("size", *(title for _, title, _ in columns)):
        table.add_column(title, justify="right", no_wrap=True)
    scored = [name for name in profile.samplers if any(row.get(f"score:{name}") is not None for row in rows)]
    if len(profile.samplers) > 1 and console.width < _WIDE:  # the files have them
        scored = []
    for number, name in enumerate(profile.samplers, 1):
        if name in scored:
            table.add_column(f"({number})\nscore", justify="right")
        table.add_column(f"({number})\n%", justify="right")
    for row in rows:
        cells = [plain(row["layer"][len(prefix) :]), _size(row["parameters"])]
        cells += [_cell(row[key], style) for key, _, style in columns]
        for sampler in profile.samplers:
            cells += [_cell(row[f"score:{sampler}"], "{:.3g}")] if sampler in scored else []
            cells.append(_chances(row, sampler))
        table.add_row(*cells)
    console.print(table)
    console.print()
    for number, sampler in enumerate(profile.samplers, 1):
        console.print(f"({number}) {plain(sampler)}", highlight=False)
    if profile.samplers:
        console.print(
            f"For each sampler, in percent: the {profile.granularity}'s probability, and its chance to be among the "
            f"{profile.num_active} that train.",
            highlight=False,
        )
    if any(row["outlier_percent"] is not None for row in rows):
        console.print(
            f"Outliers: weights above {profile.threshold:g} times the {profile.granularity}'s mean.",
            highlight=False,
        )
    for note in profile.notes:
        console.print(f"[yellow]Note:[/] {plain(note)}", highlight=False)


def write_profile(folder: Path, profile: Profile, model: str) -> list[str]:
    """Write ``profile.json``, ``profile.csv`` and ``profile.png`` into a folder.

    Args:
        folder: An existing folder.
        profile: What to write.
        model: Name of the model, for the title.

    Returns:
        Names of the files.

    Raises:
        ConfigError: If they can't be written.
    """
    rows = profile.to_rows()
    content = {
        "model": model,
        "num_active": profile.num_active,
        "granularity": profile.granularity,
        "threshold": profile.threshold,
        "samplers": list(profile.samplers),
        "layers": rows,
        "notes": list(profile.notes),
        "environment": environment(),
    }
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_json(folder / "profile.json", content)
        write_text(folder / "profile.csv", table.getvalue())
        unit = profile.granularity
        title = f"{Path(model).name}: {len(rows)} {unit}s"
        plot_profile(folder / "profile.png", rows, title, unit=unit)
    except OSError as error:
        raise ConfigError(f"The output folder must be writable, but: {error}.") from error
    return ["profile.json", "profile.csv", "profile.png"]


def _common_prefix(names: Sequence[str]) -> str:
    """What all of the names begin with, up to a dot."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def _chances(row: Mapping[str, Any], sampler: str) -> str:
    values = [row[f"{kind}:{sampler}"] for kind in ("probability", "inclusion")]
    if values == [None, None]:
        return "-"
    probability, inclusion = (None if value is None else 100 * value for value in values)
    return f"{_cell(probability, '{:.2f}')} {_cell(inclusion, '{:4.1f}')}"


def _size(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)
