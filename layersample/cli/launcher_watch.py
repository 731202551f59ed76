"""Ranks that end when their launcher is gone: one that was killed can't end them itself."""

from __future__ import annotations

import os
import signal
import threading
import time

STARTED_BY = "LAYERSAMPLE_STARTED_BY"
"""Environment variable of a rank: the id of the process that started it, where that is one of ours."""

PATIENCE = 600
"""Seconds that ranks have to write a checkpoint once they are told to stop."""

_EVERY = 1.0  # seconds


def end_with_launcher() -> None:
    """End this rank as SIGTERM does, with a checkpoint, once the process that started it is gone.

    Linux would signal that by itself (PR_SET_PDEATHSIG), but also when no more than the thread that started the rank
    ends, and other systems wouldn't at all; so a thread looks.
    """
    # An id that was told counts: the launcher may be gone before this rank comes here.
    launcher = int(os.environ.get(STARTED_BY, os.getppid()))
    threading.Thread(target=_watch, args=(launcher,), name="layersample-launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    # A rank that waits for one that is gone never comes to the end of its step.
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
