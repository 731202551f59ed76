"""``layersample train --gpus N``: the same command once for each GPU, started by torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from layersample.cli.consoles import errors
from layersample.cli.launcher_watch import PATIENCE, STARTED_BY
from layersample.errors import ConfigError

STARTED_WITH = "LAYERSAMPLE_STARTED_WITH"
"""Environment variable of a rank: the option by which its launcher was told how many there are."""


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def check_count(gpus: int | None, processes: int | None) -> None:
    """Make sure that a rank was started among as many as its command line says.

    Raises:
        ConfigError: If another launcher has started another number.
    """
    count, there = gpus or processes, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if count is not None and count != there:
        raise ConfigError(
            f"A launcher has started {there} processes on this machine, but the command line asks for {count}: leave "
            "--gpus and --processes out where torchrun or accelerate starts them."
        )


def how_to_resume(output: object) -> str:
    """The command that continues a run, started as this one was."""
    resumed = f"layersample train --output {output} --resume"
    if not is_rank():
        return resumed
    started = os.environ.get(STARTED_WITH)
    return f"{resumed} {started}" if started else f"{resumed}, by the launcher that started this run"


def lost_others(error: BaseException) -> bool:
    """Whether a rank failed because another one was gone."""
    return is_rank() and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))


def tell_launcher(error: BaseException) -> None:
    """Have torchrun show an error in its own words too."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def launch(gpus: int | None, processes: int | None) -> None:
    """Run the command line of this process in several.

    Args:
        gpus: One for each of so many GPUs of this machine.
        processes: So many on the CPU of this machine, to try a run of several ranks.

    Raises:
        ConfigError: If there are fewer GPUs.
        typer.Exit: With the exit code of the ranks, if they failed.
    """
    if gpus is not None and processes is not None:
        raise ConfigError("--gpus and --processes both say how many processes to start: choose one of them.")
    count = gpus or processes
    assert count is not None
    option = f"--gpus {gpus}" if gpus is not None else f"--processes {processes}"
    environment = {STARTED_WITH: option, STARTED_BY: str(os.getpid())}
    if gpus is not None:
        _check_gpus(gpus)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # torchrun would set one thread each, and say so.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(_threads(count)))
    with _environment(environment):
        _torchrun(count)


def _check_gpus(wanted: int) -> None:
    import torch

    there = torch.cuda.device_count()
    if wanted > there:
        raise ConfigError(
            f"--gpus must be at most the GPUs of this machine, which has {there}, but got --gpus {wanted}. For "
            "several machines start torchrun on each; to try several ranks on the CPU, use --processes."
        )


def _threads(count: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // count)


def _torchrun(count: int) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks say what is wrong
    arguments = torchrun.parse_args(  # type: ignore[no-untyped-call]
        ["--standalone", "--nproc-per-node", str(count), "-m", "layersample", *sys.argv[1:]]
    )
    if hasattr(arguments, "shutdown_timeout"):  # of torch 2.9 and later
        arguments.shutdown_timeout = PATIENCE
    try:
        torchrun.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        raise typer.Exit(_explain(error)) from error
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from error
    finally:
        _end_children()


def _explain(error: Any) -> int:
    """Say which rank was ended from outside, as it couldn't itself; the exit code of the command."""
    # A rank that lost another one ends too: what ended from outside came first.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode > 0, item[1].timestamp))
    code = int(failure.exitcode)
    if code > 0:
        return code
    by = signal.Signals(-code).name
    memory = " The system does that where memory runs out." if -code == signal.SIGKILL else ""
    errors.print(
        f"[bold red]Stopped:[/] rank {rank} was ended by {by}, and the others with it.{memory}",
        highlight=False,
        soft_wrap=True,
    )
    return 128 - code


def _end_children() -> None:
    """End ranks that are still there, as after a second Ctrl-C."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
