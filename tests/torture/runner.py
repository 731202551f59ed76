"""Draws torture after torture, and keeps what came of each in a file, so that it can be gone on with later."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layersample.environment import environment
from layersample.files import write_json
from tests.helpers import write_sums, write_tiny_model
from tests.torture import loops, schedules, two_ranks
from tests.torture.damage import Damage
from tests.torture.kills import Kills

KINDS = ("schedules", "damage", "ranks", "kills")
KILLS_A_CASE = 10  # of which each needs one run that isn't killed, to compare with


class Torture:
    """All tortures of one seed.

    Args:
        folder: For what came of them (``results.jsonl``) and for their runs.
        seed: Seed of all draws.
        kinds_of_loops: Which loops are killed.
    """

    def __init__(self, folder: Path, seed: int, kinds_of_loops: tuple[str, ...] = loops.LOOPS) -> None:
        self.folder, self.seed, self._loops = folder, seed, kinds_of_loops
        self._runs = folder / "runs"
        shutil.rmtree(self._runs, ignore_errors=True)
        self._runs.mkdir(parents=True)
        write_tiny_model(self._runs / "model")
        write_sums(self._runs / "sums.jsonl")
        self._kills: tuple[int, Kills] | None = None
        self._damage: Damage | None = None
        self._commit = _commit()
        self.results = [line for line in self._read() if line["seed"] == seed]

    @property
    def _path(self) -> Path:
        return self.folder / "results.jsonl"

    def _read(self) -> Iterator[dict[str, Any]]:
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def run(self, kind: str, count: int, report: Callable[[str], None] = lambda _: None) -> int:
        """Do the first tortures of a kind, but for those that are done; give how many of them ended wrong."""
        tortures: dict[str, Callable[[int], tuple[Any, str | None]]] = {
            "schedules": self._schedule,
            "damage": self._damage_one,
            "ranks": self._ranks,
            "kills": self._kill,
        }
        do = tortures[kind]
        done = {line["index"] for line in self.results if line["kind"] == kind}
        for index in range(count):
            if index in done:
                continue
            try:
                what, wrong = do(index)
            except Exception as error:
                what, wrong = None, "".join(traceback.format_exception(error)[-3:])
            line = {"kind": kind, "seed": self.seed, "index": index, "what": what, "wrong": wrong}
            line["commit"] = self._commit
            self.results.append(line)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if wrong:
                report(f"wrong: {kind} {index}: {what}: {wrong}")
            elif (index + 1) % 50 == 0:
                report(f"{kind}: {index + 1} of {count}")
        mine = [line for line in self.results if line["kind"] == kind and line["index"] < count]
        return sum(line["wrong"] is not None for line in mine)

    @property
    def killed(self) -> int:
        """How many processes were killed in all."""
        kills = [line["what"] for line in self.results if line["kind"] == "kills"]
        return sum(what["killed"] for what in kills if what)

    def store(self, path: Path) -> None:
        """Write how many were done and how many ended wrong, on which commits and machine."""
        by_kind = {kind: [line for line in self.results if line["kind"] == kind] for kind in KINDS}
        counts = {
            kind: {"done": len(lines), "wrong": sum(line["wrong"] is not None for line in lines)}
            for kind, lines in by_kind.items()
        }
        commits = list(dict.fromkeys(line["commit"] for line in self.results))
        write_json(
            path,
            {
                "seed": self.seed,
                **counts,
                "processes_killed": self.killed,
                "commits": commits,
                "environment": environment(),
            },
        )

    def _schedule(self, index: int) -> tuple[Any, str | None]:
        case = schedules.draw(self.seed, index)
        return case, schedules.run(case)

    def _ranks(self, index: int) -> tuple[Any, str | None]:
        case, folder = two_ranks.draw(self.seed, index), self._runs / "ranks"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return case, two_ranks.run(case, folder)

    def _kill(self, index: int) -> tuple[Any, str | None]:
        number = index // KILLS_A_CASE
        case = loops.draw(self.seed, number, self._loops)
        if self._kills is None or self._kills[0] != number:
            folder = self._runs / "kills"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._kills = number, Kills(case, folder, self._runs)
        killed, wrong = self._kills[1].kill(random.Random(f"kill {self.seed} {index}"))
        return {**case, "killed": killed}, wrong

    def _damage_one(self, index: int) -> tuple[Any, str | None]:
        if self._damage is None:
            folder = self._runs / "damage"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._damage = Damage(folder)
        return self._damage.damage(random.Random(f"damage {self.seed} {index}"))


def _commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where files differ from it; none outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
