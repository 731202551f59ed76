"""The folder of a benchmark: its suite, and one line a run, so that a benchmark can be killed and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import yaml

from layersample.environment import environment
from layersample.errors import ConfigError
from layersample.files import LOCK, check_output, only_one, write_text

from .entries import MethodEntry
from .fingerprints import fingerprint
from .jobs import WITHOUT_RATE, Job
from .stored_lines import Line, check_line, has_steps, machine_in_words, machine_of
from .suite import Suite, make_suite
from .suite_files import read_stored_keys
from .suite_keys import SEARCH_SEEDS

SEARCHES = "search"  # the folder of searches for recipes, in that of the benchmark
# A final run's own key leaves out the learning rate, on which a timing doesn't depend.
_Key = tuple[str, float]


class Results:
    """What the runs of a suite have measured.

    Rows that another call has put into the folder stay in it, and in its report.

    Args:
        folder: Holds ``suite.yaml`` and ``results.jsonl``.
        suite: What is measured now.
    """

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.folder = folder
        self.suite = suite
        self._fingerprints = {entry.name: fingerprint(suite, entry) for entry in suite.entries}
        self._whole = suite  # with the rows of before
        self._lines: dict[_Key, Line] = {}
        self._lock = Lock()
        self._held = ExitStack()

    @property
    def path(self) -> Path:
        """The file of the runs."""
        return self.folder / "results.jsonl"

    def open(self, command: str | None = None) -> Results:
        """Make the folder, or take what is in it. Failed runs are left out, so that they are tried again.

        Args:
            command: What is typed to make the results, for the report; it is put behind those of before.

        Raises:
            ConfigError: If the folder holds another suite or something else, another benchmark writes into it, or
                it can't be written. What it holds stays as it was.
        """
        check_output(self.folder)
        stored = self.folder / "suite.yaml"
        if not stored.is_file() and self.folder.exists() and not _is_empty(self.folder):
            raise ConfigError(
                f"The output folder must be new, empty or of an earlier benchmark, but {self.folder} holds "
                "something else. Choose another --output."
            )
        if not stored.is_file():
            self.suite.check_references()
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            self._held.enter_context(only_one(self.folder))
            # Under the lock: another benchmark may just have added its rows. One without a good run binds nothing.
            there = list(read_lines(self.path))
            if stored.is_file() and any("error" not in line for line in there):
                self._whole = self._with_rows_of(read_stored(stored), there)
            self._whole.check_references()
            self._lines = self._kept(there)
            self._write(self._whole, command)
        except OSError as error:
            self.close()
            raise ConfigError(f"The output folder must be writable, but: {error}.") from error
        except BaseException:
            self.close()
            raise
        return self

    def _write(self, whole: Suite, command: str | None) -> None:
        """Write the suite, and the runs that are kept."""
        content = whole.model_dump(mode="json")
        # Which methods there are depends on what is installed: a later run must find the same ones.
        content["methods"] = [entry.model_dump(mode="json", exclude_defaults=True) for entry in whole.entries]
        write_text(
            self.folder / "suite.yaml", yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        )
        if command is not None:
            self._note(command)
        # Without failed runs, and without a line that a killed benchmark left unfinished.
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))

    def close(self) -> None:
        """Let another benchmark write into the folder."""
        self._held.close()

    def check_threads(self, threads: int) -> None:
        """Make sure that runs have as many threads as those that are stored.

        Args:
            threads: Threads of a run.

        Raises:
            ConfigError: If they haven't: neither their seconds nor their bits could be compared.
        """
        stored = {line["environment"]["threads"] for line in self._lines.values() if "environment" in line}
        if other := sorted(stored - {threads}):
            raise ConfigError(
                f"{self.folder} holds runs of {other[0]} threads each, but these would have {threads}: give as many "
                "--jobs as then, or another --output."
            )

    def other_machines(self, threads: int) -> str | None:
        """What a user should know of runs that another machine has done; ``None`` where there are none.

        Args:
            threads: Threads of a run.
        """
        here = machine_in_words({**environment(), "threads": threads})
        there = {machine_of(line) for line in self._lines.values() if "environment" in line}
        if others := sorted(there - {here}):
            return (
                f"{self.folder} holds runs of another machine ({'; '.join(others)}) than this one ({here}). "
                "What was matched there stays as it is; seconds of the two aren't compared, and losses may differ in "
                "their last digits."
            )
        return None

    def entry(self, name: str) -> MethodEntry:
        """A row, which may be one of before."""
        return self._whole.entry(name)

    def get(self, job: Job) -> Line | None:
        """What a run has measured; ``None`` where it hasn't been run with that learning rate, or with other steps."""
        line = self._lines.get(_key_of(job.key, job.stage, job.learning_rate))
        # The key of a timing says nothing of its steps, which may change where all methods have the same ones.
        return line if line is not None and has_steps(line, job.steps) else None

    def add(self, job: Job, measured: Line) -> None:
        """Keep what a run has measured, or the error that it ended with; on the disk at once."""
        self._keep(
            {
                "key": job.key,
                "method": job.row,
                "stage": job.stage,
                "seed": job.seed,
                "learning_rate": job.learning_rate,
                "fingerprint": self._fingerprints[job.row],
                **measured,
            }
        )

    def add_match(self, row: str, stage: str, given: Line) -> None:
        """Keep what a method is given, or why nothing can be: later calls go by it."""
        key, seed = f"match/{row}/{stage}", self.suite.seeds[0]
        own = {"key": key, "method": row, "stage": stage, "seed": seed, "learning_rate": 0.0}
        self._keep({**own, "fingerprint": self._fingerprints[row], **given})

    def _keep(self, line: Line) -> None:
        with self._lock:
            self._lines[_key(line)] = line
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def lines(self) -> list[Line]:
        """All runs, in the order of the suite's rows."""
        return _in_order(self.suite, self._lines.values())

    def all_lines(self) -> list[Line]:
        """All runs, those of rows of before too."""
        return list(self._lines.values())

    def _with_rows_of(self, stored: Suite, lines: Iterable[Line]) -> Suite:
        """The suite of now, with the other rows of one before, which must be the same in all else."""
        asked, there = self.suite.model_dump(mode="json"), stored.model_dump(mode="json")
        decisive = {**self.suite.identity(), **stored.identity()}
        searched = any(line["stage"] in ("search", "runoff") for line in lines)
        kept = [key for key in asked if key in decisive or (searched and key in SEARCH_SEEDS)]
        if different := [key for key in kept if asked[key] != there[key]]:
            key = different[0]
            raise ConfigError(
                f"{self.folder} holds the results of another suite: its {key} is {there[key]!r}, but {asked[key]!r} "
                "is asked for now. Choose another --output, or leave the option out to go on with that suite."
            )
        own = _with_seeds_run(self.suite, stored, lines)
        if all(entry.name in own for entry in stored.entries):
            return self.suite.model_copy(update={"methods": list(own.values())})
        plugins = {suite.plugin for suite in (self.suite, stored) if suite.plugin is not None}
        if len(plugins) > 1 or self.suite.seeds[0] != stored.seeds[0]:
            raise ConfigError(
                f"{self.folder} holds other methods too, so that the plug-in and the first seed must be theirs "
                f"({stored.plugin}, {stored.seeds[0]}), but got {self.suite.plugin}, {self.suite.seeds[0]}. "
                "Choose another --output."
            )
        rows = {entry.name: entry for entry in stored.entries} | own
        # Rates and seeds of their own: they may have been asked for with others.
        methods = [
            entry.model_copy(
                update={
                    "learning_rates": entry.learning_rates or suite.learning_rates,
                    "seeds": None if (seeds := suite.seeds_of(entry)) == stored.seeds else seeds,
                }
            )
            for name, entry in rows.items()
            for suite in [self.suite if name in own else stored]
        ]
        return self.suite.model_copy(
            update={
                "methods": methods,
                "learning_rates": None,
                "seeds": stored.seeds,
                "plugin": next(iter(plugins), None),
            }
        )

    def _kept(self, lines: Iterable[Line]) -> dict[_Key, Line]:
        """The latest line of each run that needn't be run again."""
        latest = {_key(line): line for line in lines}
        rows = {entry.name for entry in self._whole.entries} - self._fingerprints.keys()  # of before
        lines = [line for line in latest.values() if "error" not in line or line["method"] in rows]
        for line in lines:
            name = line["method"]
            if line["fingerprint"] != self._fingerprints.get(name, line["fingerprint"]):
                raise ConfigError(
                    f"{self.folder} holds results of a method {name!r} with other options, another first seed, or "
                    "from a plug-in or data file that has been edited since. Choose another name for the method, or "
                    "another --output."
                )
        return {_key(line): line for line in lines}

    def _note(self, command: str) -> None:
        path = self.folder / "command.txt"
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if command not in before:
            write_text(path, "\n".join([*before, command, ""]))


def read_lines(path: Path) -> Iterable[Line]:
    """The runs in a file; a last line that a killed benchmark left unfinished is left out.

    Raises:
        ConfigError: If another line is no JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be readable text, but: {error}.") from error
    for number, text in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ConfigError(f"{place}: must be one JSON object, but: {error}.") from error
            return
        yield check_line(content, place)


def has_runs(folder: Path) -> bool:
    """Whether a folder holds a run that a report can show; the tries of a search are elsewhere until it has ended."""
    return next(iter(read_lines(folder / "results.jsonl")), None) is not None


def read_results(folder: Path) -> tuple[Suite, list[Line]]:
    """A benchmark's suite and all of its runs, failed ones too; nothing is changed.

    Raises:
        ConfigError: If the folder holds no benchmark.
    """
    stored = folder / "suite.yaml"
    if not stored.is_file():
        raise ConfigError(f"The folder must be that of a benchmark, but {folder} holds no suite.yaml.")
    suite = read_stored(stored)
    path = folder / "results.jsonl"
    lines = list(read_lines(path))
    latest = {_key(line): line for line in lines}
    rows = {entry.name for entry in suite.entries}
    if strange := sorted({line["method"] for line in lines} - rows):
        raise ConfigError(
            f"{path}: every run must be of a method in suite.yaml, but {strange[0]!r} isn't there."
        )
    return suite, _in_order(suite, latest.values())


def read_stored(path: Path) -> Suite:
    """The suite of a benchmark's folder.

    Raises:
        ConfigError: If the file is damaged.
    """
    return make_suite((str(path), read_stored_keys(path)))


def _with_seeds_run(suite: Suite, stored: Suite, lines: Iterable[Line]) -> dict[str, MethodEntry]:
    """The rows of a suite; seeds that have been run stay in the report, though fewer are asked for now."""
    run = {(line["method"], line["seed"]) for line in lines if line["stage"] == "final"}
    there = {entry.name: stored.seeds_of(entry) for entry in stored.entries}
    rows = {}
    for entry in suite.entries:
        asked = suite.seeds_of(entry)
        more = [s for s in there.get(entry.name, []) if (entry.name, s) in run and s not in asked]
        rows[entry.name] = entry.model_copy(update={"seeds": [*asked, *more]}) if more else entry
    return rows


def _in_order(suite: Suite, lines: Iterable[Line]) -> list[Line]:
    order = {entry.name: number for number, entry in enumerate(suite.entries)}
    known = [line for line in lines if line["method"] in order]
    return sorted(known, key=lambda line: (order[line["method"]], line["stage"], line["seed"]))


def _key(line: Line) -> _Key:
    return _key_of(line["key"], line["stage"], line["learning_rate"])


def _key_of(key: str, stage: str, learning_rate: float) -> _Key:
    return key, 0.0 if stage in WITHOUT_RATE else learning_rate


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or what :meth:`Results.open` makes first."""
    return folder.is_dir() and all(path.name in (LOCK, "logs", SEARCHES) for path in folder.iterdir())
