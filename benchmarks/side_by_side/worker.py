"""The process that does the runs: ``python -m layersample_benchmarks.side_by_side.worker``, for the runner alone.

It imports what a run needs once, and then forks for each run: a run still begins as a process of its own that has done
nothing, so that its numbers are those of a fresh process to the bit. The runner writes a line of JSON for each job to
standard input. A run writes a line for each step, and at the end for the result, to standard output; behind them this
process writes how the run ended. Everything else that is printed goes to the log of the run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Given = dict[str, Any]
Send = Callable[[dict[str, Any]], None]


def main() -> None:
    """Run jobs until the runner ends."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not get between the events

    def send(event: dict[str, Any]) -> None:
        events.write(f"\n{json.dumps(event)}\n")  # behind a line that a killed run hasn't ended

    warm_up()
    may_fork = _may_fork()
    for given in _read_jobs():
        if not may_fork:  # this process does the one job, and the runner starts another
            threading.Thread(target=_end_with, args=(0,), daemon=True).start()
            _do(given, send)
        send({"ended": _fork(given, send)})


def warm_up() -> None:
    """Import what every run needs, so that none has other code than the one before; no device may be chosen here."""
    from layersample.notices import hide_missing_kernel

    hide_missing_kernel()
    import datasets
    import peft  # noqa: F401
    import trl  # noqa: F401
    from transformers.utils import logging as transformers_logging

    from layersample.integrations import transformers as _sampling  # noqa: F401
    from layersample.planning import budget  # noqa: F401
    from layersample.registry import list_samplers

    from . import training

    list_samplers()  # imports the modules of all that are installed
    training.git_revision()  # of this code, which runs of hours later have too
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _fork(given: Given, send: Send) -> int:
    """Do a job in a fork of this process, and give its exit code, negative for a signal."""
    # The run's end of `ended` closes with it; this process's end of `alive` closes when it dies, killed or not.
    (ended, run_ends), (alive, we_live) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        os.close(ended)
        os.close(we_live)
        threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
        _do(given, send)
    os.close(run_ends)
    os.close(alive)
    ready, _, _ = select.select([0, ended], [], [])
    if (
        ended not in ready
    ):  # standard input has ended, and with it the runner: it says nothing while a run goes on
        os.kill(process, signal.SIGKILL)
        os._exit(1)
    status = os.waitpid(process, 0)[1]
    os.close(ended)
    os.close(we_live)
    return os.waitstatus_to_exitcode(status)


def _do(given: Given, send: Send) -> NoReturn:
    """Do a job, and end this process with it."""
    log = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TMPDIR"] = given["scratch"]
    tempfile.tempdir = None  # found anew
    # Line by line: a run may be killed at any moment.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = 0
    try:
        send({"result": _run(given, send)})
    except Exception as error:
        import traceback

        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the clean-up of a process whose copy this is


def _run(given: Given, send: Send) -> dict[str, Any]:
    import torch

    from .jobs import Job
    from .suite import Suite
    from .training import run_job

    torch.set_num_threads(given["threads"])
    suite, job = Suite(**given["suite"]), Job(**given["job"])
    return run_job(
        suite, job, lambda step: send({"step": step["step"], "steps": job.steps, "loss": step["loss"]})
    )


def _read_jobs() -> Iterator[Given]:
    """The runner's lines, read without a buffer of Python's own, which a fork would share."""
    text = b""
    while part := os.read(0, 2**16):
        text += part
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            yield json.loads(line)


def _may_fork() -> bool:
    """Whether a fork of this process could use a GPU: not once CUDA has begun here, if only to count devices."""
    import torch

    process = os.fork()
    if process == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def _end_with(descriptor: int) -> None:
    """End this process as soon as the other end of a pipe is closed; a run without its runner takes its place."""
    while os.read(descriptor, 2**16):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
