"""Runs that are killed hard, at random moments, and begun again: they must end to the bits of one that wasn't."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.torture import loops

_PATHS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
_SECONDS = 300  # no run takes as long


class Kills:
    """Kills runs of one case again and again.

    All runs are forks of this process, which has imported everything.

    Args:
        case: Of :func:`tests.torture.loops.draw`.
        folder: For the runs.
        shared: Model and data of ``layersample train``.
    """

    def __init__(self, case: dict[str, Any], folder: Path, shared: Path) -> None:
        self._case, self._folder, self._shared = case, folder, shared
        begun = time.monotonic()
        status = self._fork(folder / "whole", lambda events: None)
        self._seconds = time.monotonic() - begun
        if status:
            raise RuntimeError(f"the run fails without a kill: {self._log()}")
        self._whole = self._result()
        self._events = int((folder / "events").read_text())

    def kill(self, rng: random.Random) -> tuple[int, str | None]:
        """Kill one run up to three times, and let it end.

        Returns:
            How often it was killed, and what is wrong with its end, if anything.
        """
        run, killed = self._folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.5:
                at = rng.randint(1, self._events)
                status = self._fork(run, lambda events, at=at: at)  # type: ignore[misc]
            else:
                status = self._fork(run, lambda events: None, after=rng.uniform(0, self._seconds))
            killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if status and not os.WIFSIGNALED(status):
                return killed, f"could not go on: {self._log()}"
        if self._fork(run, lambda events: None):
            return killed, f"could not go on at the end: {self._log()}"
        return killed, self._difference(self._result())

    def _difference(self, ended: dict[str, Any]) -> str | None:
        if ended.keys() != self._whole.keys():
            return "other weights are there"
        for name, value in self._whole.items():
            same = (
                torch.equal(value, ended[name]) if isinstance(value, torch.Tensor) else value == ended[name]
            )
            if not same:
                return f"{name} differs"
        return None

    def _fork(self, run: Path, kill_at: Callable[[int], int | None], after: float = _SECONDS) -> int:
        """Run in a copy of this process that is killed at an event, or after a time; give how it ended."""
        (self._folder / "result.pt").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._child(run, kill_at(0))
        end = time.monotonic() + after
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def _child(self, run: Path, kill_at: int | None) -> None:
        code = 1
        log = os.open(self._folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            # torch makes its pool of threads anew in a fork, and two threads that do it at once (as in the loading of
            # a model) trip an assertion of torch's.
            torch.set_num_threads(torch.get_num_threads())
            events = _count_events(run, kill_at)
            result = loops.run(self._case, run, self._shared)
            torch.save(result, self._folder / "result.pt")
            (self._folder / "events").write_text(str(events[0]))
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _result(self) -> dict[str, Any]:
        result: dict[str, Any] = torch.load(self._folder / "result.pt", weights_only=True)
        return result

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-1500:]


def _count_events(run: Path, kill_at: int | None) -> list[int]:
    """Count what this process does to files of a run, and its optimizer's steps; die at one of them."""
    count, prefix = [0], str(run)

    def happens() -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def look(event: str, args: tuple[Any, ...]) -> None:
        if event in _PATHS and str(args[0]).startswith(prefix):
            happens()

    sys.addaudithook(look)
    register_optimizer_step_pre_hook(lambda *_: happens())
    register_optimizer_step_post_hook(lambda *_: happens())
    return count
