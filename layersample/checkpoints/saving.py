"""Where a checkpoint is written before it is whole, and whether it could be loaded again."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layersample.errors import ConfigError


def saving_folder(folder: Path, step: int) -> Path:
    """Where this process writes a checkpoint before it is whole; no other process has the same."""
    return folder / f".saving-{step}-{_host()}-{os.getpid()}"


def remove_unfinished(folder: Path, *, alone: bool = False) -> None:
    """Remove what a run that was killed had begun to save.

    What a process that still runs, or that ran on another machine, has begun stays: it may be at work on it.

    Args:
        folder: Where the checkpoints are.
        alone: Whether no other process can be at work in it, because this one holds its lock: all goes.
    """
    for leftover in folder.glob(".saving-*"):
        found = re.fullmatch(r"\.saving-\d+-(.+)-(\d+)", leftover.name)
        if alone or (found and found[1] == _host() and not _runs(int(found[2]))):
            shutil.rmtree(leftover, ignore_errors=True)


def check_loadable(path: Path, what: str, *, arrays: bool = False) -> None:
    """Make sure that a file can be loaded with ``torch.load(weights_only=True)``; no tensor is read.

    Args:
        path: The file, just written.
        what: What is in it, for the message.
        arrays: Whether it is loaded by :func:`load_state`, which takes NumPy's arrays as well.

    Raises:
        ConfigError: If it can't.
    """
    try:
        load = load_state if arrays else partial(torch.load, weights_only=True)
        load(path, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported [^\n]*|GLOBAL [^\n]*? was not", str(error))
        hint = f" ({reason[0].removesuffix(' was not')})" if reason else ""
        raise ConfigError(
            f"What is saved must be made of tensors, numbers, text, lists and dictionaries, so that it can be loaded "
            f"without running code from the file, but {what} holds other objects{hint}: give them as those, say an "
            "array as torch.from_numpy(array) or array.tolist()."
        ) from error


def load_state(path: Path, **options: Any) -> Any:
    """Load what was saved, without running code from the file: tensors, plain values, and NumPy's arrays of values.

    Args:
        path: The file.
        options: Of ``torch.load``.

    Raises:
        pickle.UnpicklingError: If it holds anything else.
    """
    # The functions behind arrays and single values have other places in NumPy 1 and 2.
    functions: list[Any] = [np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    types = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"]
    with torch.serialization.safe_globals([*functions, np.ndarray, np.dtype, *types]):
        return torch.load(path, weights_only=True, **options)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _runs(process: int) -> bool:
    """Whether another process of this machine is alive; what this process left behind isn't being written to."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True
