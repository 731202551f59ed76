"""A rank whose launcher is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from layersample.cli import launcher_watch


def test_a_rank_is_told_to_stop_and_ended_where_it_can_not(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, did = [41, 41, 1], list[Any]()
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(os, "kill", lambda process, number: did.append((process, number)))
    monkeypatch.setattr(time, "sleep", did.append)
    launcher_watch._watch(41)
    own = os.getpid()
    assert did == [1.0, 1.0, (own, signal.SIGTERM), launcher_watch.PATIENCE, (own, signal.SIGKILL)]


@pytest.mark.parametrize(("told", "watched"), [("7", 7), (None, os.getppid())], ids=["told", "not told"])
def test_what_a_launcher_of_ours_has_told_counts(
    told: str | None, watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(launcher_watch.STARTED_BY, raising=False)
    if told is not None:
        monkeypatch.setenv(launcher_watch.STARTED_BY, told)
    threads: list[Any] = []

    class Thread:
        def __init__(self, **options: Any) -> None:
            threads.append(options)

        def start(self) -> None:
            threads.append("started")

    monkeypatch.setattr(threading, "Thread", Thread)
    launcher_watch.end_with_launcher()
    options, started = threads
    assert started == "started" and options["args"] == (watched,) and options["daemon"]
