"""The folder of a benchmark: its suite, and one line a run, so that a benchmark can be killed and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from layersample.config import read_yaml
from layersample.errors import ConfigError
from layersample.files import write_text

from .suite import MAY_CHANGE, Job, Suite, fingerprint, make_suite


class Results:
    """What the runs of a suite have measured.

    Args:
        folder: Holds ``suite.yaml`` and ``results.jsonl``.
        suite: What is measured.
    """

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.folder = folder
        self.suite = suite
        self._fingerprints = {entry.name: fingerprint(suite, entry) for entry in suite.entries}
        self._lines: dict[str, dict[str, Any]] = {}
        self._lock = Lock()

    @property
    def path(self) -> Path:
        """The file of the runs."""
        return self.folder / "results.jsonl"

    def open(self, command: str | None = None) -> Results:
        """Make the folder, or take what is in it. Failed runs are left out, so that they are tried again.

        Args:
            command: What made the results, for the report.

        Raises:
            ConfigError: If it holds another suite or something else, or can't be written.
        """
        stored = self.folder / "suite.yaml"
        if stored.is_file():
            self._check_same(make_suite((str(stored), read_yaml(stored))))
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(
                f"The output folder must be new, empty or of an earlier benchmark, but {self.folder} holds "
                "something else. Choose another --output."
            )
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            content = self.suite.model_dump(mode="json")
            # Which methods there are depends on what is installed: a later run must find the same ones.
            content["methods"] = [
                entry.model_dump(mode="json", exclude_defaults=True) for entry in self.suite.entries
            ]
            write_text(stored, yaml.safe_dump(content, sort_keys=False))
            if command is not None:
                write_text(self.folder / "command.txt", command + "\n")
            self._read()
            self._rewrite()
        except OSError as error:
            raise ConfigError(f"The output folder must be writable, but: {error}.") from error
        return self

    def get(self, job: Job) -> dict[str, Any] | None:
        """What a run has measured; ``None`` where it hasn't been run with that learning rate."""
        line = self._lines.get(job.key)
        return line if line is not None and line["learning_rate"] == job.learning_rate else None

    def add(self, job: Job, measured: dict[str, Any]) -> None:
        """Keep what a run has measured, or the error that it ended with; on the disk at once."""
        line = {
            "key": job.key,
            "method": job.row,
            "stage": job.stage,
            "seed": job.seed,
            "learning_rate": job.learning_rate,
            "fingerprint": self._fingerprints[job.row],
            **measured,
        }
        with self._lock:
            self._lines[job.key] = line
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """All runs, in the order of the suite's rows."""
        order = {entry.name: number for number, entry in enumerate(self.suite.entries)}
        known = [line for line in self._lines.values() if line["method"] in order]
        return sorted(known, key=lambda line: (order[line["method"]], line["stage"], line["seed"]))

    def _check_same(self, other: Suite) -> None:
        here, there = (s.model_dump(mode="json", exclude=MAY_CHANGE) for s in (self.suite, other))
        if different := [key for key in here if here[key] != there[key]]:
            key = different[0]
            raise ConfigError(
                f"{self.folder} holds the results of another suite: its {key} is {there[key]!r}, but {here[key]!r} "
                "is asked for now. Choose another --output, or leave the option out to go on with that suite."
            )
        stored = {entry.name: fingerprint(other, entry) for entry in other.entries}
        for name, here_too in self._fingerprints.items():
            if stored.get(name, here_too) != here_too:
                raise ConfigError(
                    f"{self.folder} holds results of a method {name!r} with other options or another first seed. "
                    "Choose another name for it, or another --output."
                )

    def _read(self) -> None:
        for line in read_lines(self.path):
            if line["fingerprint"] == self._fingerprints.get(line["method"], line["fingerprint"]):
                self._lines[line["key"]] = line
        self._lines = {key: line for key, line in self._lines.items() if "error" not in line}

    def _rewrite(self) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The runs in a file; a last line that a killed benchmark left unfinished is left out.

    Raises:
        ConfigError: If another line is no JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, text in enumerate(lines, 1):
        try:
            yield json.loads(text)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(
                    f"{path}, line {number}: must be one JSON object, but: {error.msg}."
                ) from error


def read_results(folder: Path) -> tuple[Suite, list[dict[str, Any]]]:
    """A benchmark's suite and all of its runs, failed ones too; nothing is changed.

    Raises:
        ConfigError: If the folder holds no benchmark.
    """
    stored = folder / "suite.yaml"
    if not stored.is_file():
        raise ConfigError(f"The folder must be that of a benchmark, but {folder} holds no suite.yaml.")
    suite = make_suite((str(stored), read_yaml(stored)))
    order = {entry.name: number for number, entry in enumerate(suite.entries)}
    latest = {line["key"]: line for line in read_lines(folder / "results.jsonl") if line["method"] in order}
    return suite, sorted(
        latest.values(), key=lambda line: (order[line["method"]], line["stage"], line["seed"])
    )
