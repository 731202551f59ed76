"""Rows that are stored as soon as they are there, so that a command that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layersample.errors import ConfigError
from layersample.files import write_json

from .bench import Row


class StoredRows:
    """The rows of each job, in a file that is there until all of them are.

    Args:
        file: Where they are.
        machine: What they were measured on, of JSON types; rows of another machine aren't put beside them.

    Raises:
        ConfigError: If the file is of another machine, or can't be read.
    """

    def __init__(self, file: Path, machine: dict[str, Any]) -> None:
        self._file, self._machine = file, machine
        self._jobs: dict[str, list[dict[str, Any]]] = {}
        if not file.is_file():
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            there, jobs = stored["machine"], stored["jobs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"The file {file} must hold measured rows, but can't be read: remove it."
            ) from error
        if there != machine:
            raise ConfigError(
                f"The rows in {file} must be of this machine ({machine}), but are of {there}: give another --output, "
                "or remove the file to begin anew."
            )
        self._jobs = jobs

    def rows(self, job: str) -> list[Row] | None:
        """The rows of a job; None where it hasn't been run to its end, or ended with an error."""
        rows = [Row(**row) for row in self._jobs.get(job, ())]
        return None if not rows or any(row.verdict == "FAILED" for row in rows) else rows

    def add(self, job: str, rows: Iterable[Row]) -> None:
        """Store the rows of a job."""
        self._jobs[job] = [vars(row) for row in rows]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {"machine": self._machine, "jobs": self._jobs})

    def end(self) -> None:
        """Remove the file: its rows are in the table."""
        self._file.unlink(missing_ok=True)
