"""Checkpoints of a plain training loop: each appears at once when it is finished, and is checked before it is used."""

from __future__ import annotations

import pickle
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from layersample.checkpoints.saving import check_loadable, load_state, remove_unfinished, saving_folder
from layersample.checkpoints.seal import (
    CheckpointError,
    check,
    find_last,
    last_number,
    remove_oldest,
    seal,
    step_of,
)
from layersample.errors import ConfigError
from layersample.files import replace_folder
from layersample.option_files import Options, make_options
from layersample.options import MOST, option

_RANDOM = "random"  # the random generators are kept under this name


class _CheckpointOptions(Options):
    folder: Path = option(..., "Where the checkpoints are.")
    keep: int = option(2, "How many of the last ones stay.", ge=1, le=MOST)
    verify: bool = option(True, "Whether loading compares checksums.")


class _Step(Options):
    step: int = option(..., "Optimizer steps done.", ge=0, le=MOST)


class _Folder(Options):
    checkpoint: Path = option(..., "A checkpoint's folder.")


class Stateful(Protocol):
    """Whatever has a state to be kept: a model, an optimizer, a learning-rate schedule, a scheduler, a loader."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it back."""


class Checkpoints:
    """Saves and loads the checkpoints of a plain training loop, each whole or not at all.

    A run that is killed at any moment, and resumed, ends with the same bits as one that wasn't: the state of torch's
    and Python's random generators is kept too. Make the objects as for a new run, then call :meth:`load_last`.

    One run at a time saves into a folder. Which checkpoint is the last is a matter of when it was saved, not of its
    step: a run may go back to an earlier one with :meth:`load`, and on from there.

    Args:
        folder: Where the checkpoints are: ``checkpoint-STEP`` each.
        objects: What is kept, by name, in the order in which it is loaded: the model first, then the optimizer,
            then its schedule and the :class:`~layersample.LayerScheduler`. A name has letters, digits, ``_``, ``-``
            and ``.``, and isn't ``random``.
        keep: How many of the last checkpoints stay, at least 1.
        verify: Whether loading compares the checksums of all files, and not their sizes alone: it reads every byte
            once more, at about 2 GB/s a processor.

    Raises:
        ConfigError: If an argument is of another type or out of bounds, a name can't be a file's, or an object has no
            state.

    Example:
        >>> checkpoints = Checkpoints("run", {"model": model, "optimizer": optimizer})  # doctest: +SKIP
        >>> for step in range(checkpoints.load_last(), 1000):  # doctest: +SKIP
        ...     train(step)
        ...     if (step + 1) % 100 == 0:
        ...         checkpoints.save(step + 1)
    """

    def __init__(
        self, folder: str | Path, objects: Mapping[str, Stateful], *, keep: int = 2, verify: bool = True
    ) -> None:
        given = {"folder": folder, "keep": keep, "verify": verify}
        options = make_options(_CheckpointOptions, [("", given)], "argument")
        _check_names(objects)
        for name, value in objects.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise ConfigError(
                    f"What is kept must have state_dict and load_state_dict, but {name!r} ({type(value).__name__}) "
                    "hasn't."
                )
        self.folder, self.keep, self.verify = options.folder, options.keep, options.verify
        self._objects = dict(objects)
        self._number = last_number(self.folder)  # of the last checkpoint that this run knows of

    def save(self, step: int) -> Path:
        """Write a checkpoint, and remove the oldest ones only once it is whole.

        Args:
            step: Optimizer steps done, at least 0.

        Raises:
            ConfigError: If it isn't a whole number of steps, an object's state couldn't be loaded again, or another
                run has saved into the folder since this one began. Nothing is then written or removed.
        """
        step = make_options(_Step, [("", {"step": step})], "argument").step
        self._check_alone()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch, target = saving_folder(self.folder, step), self.folder / f"checkpoint-{step}"
        remove_unfinished(self.folder)
        scratch.mkdir()
        try:
            for name, value in self._objects.items():
                _save_state(value.state_dict(), scratch / f"{name}.pt", f"the state of {name!r}")
            torch.save(_random_state(), scratch / f"{_RANDOM}.pt")
            seal(scratch, self._number + 1)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        replace_folder(scratch, target)
        self._number += 1
        remove_oldest(self.folder, self.keep)
        return target

    def load_last(self) -> int:
        """Load the last checkpoint.

        Returns:
            Optimizer steps done; 0 where there is no checkpoint.

        Raises:
            CheckpointError: As :func:`check` and :meth:`load`.
        """
        last = find_last(self.folder)
        if last is None:
            self._number = 0
            return 0
        return self.load(last)

    def load(self, checkpoint: str | Path) -> int:
        """Load one checkpoint.

        Args:
            checkpoint: Its folder.

        Raises:
            CheckpointError: As :func:`check`; or if it holds other objects than these.
            ConfigError: If it isn't a path.
        """
        checkpoint = make_options(_Folder, [("", {"checkpoint": checkpoint})], "argument").checkpoint
        check(checkpoint, verify=self.verify)
        held = {path.name.removesuffix(".pt") for path in checkpoint.glob("*.pt")} - {_RANDOM}
        if held != set(self._objects):
            raise CheckpointError(
                f"The checkpoint {checkpoint} must hold {', '.join(sorted(self._objects))}, but holds "
                f"{', '.join(sorted(held)) or 'nothing'}."
            )
        states = {name: load_state(checkpoint / f"{name}.pt") for name in self._objects}
        for name, value in self._objects.items():
            value.load_state_dict(states[name])
        _set_random_state(load_state(checkpoint / f"{_RANDOM}.pt"))
        self._number = last_number(self.folder)
        return step_of(checkpoint)

    def _check_alone(self) -> None:
        """Two runs in one folder would remove each other's checkpoints, and resume from the other's."""
        if last_number(self.folder) > self._number:
            raise ConfigError(
                f"One run at a time may save into a folder, but another one has saved {find_last(self.folder)} since "
                "this one began: choose another folder for one of them."
            )


def _check_names(objects: Mapping[str, Stateful]) -> None:
    if not isinstance(objects, Mapping):
        raise ConfigError(
            f"What is kept must be a mapping of names to objects, but got a {type(objects).__name__}."
        )
    seen: set[str] = set()
    for name in objects:
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"\w[\w.-]*", name)
            or name.lower() == _RANDOM
            or name.lower() in seen
        ):
            raise ConfigError(
                "The name of what is kept must be made of letters, digits, '_', '-' and '.', stand once (in small or "
                f"capital letters), and not be {_RANDOM!r}, where the random generators are kept; but got {name!r}."
            )
        seen.add(name.lower())


def _save_state(state: object, path: Path, what: str) -> None:
    """Save a state, and make sure that it can be loaded, now and not when it is needed."""
    try:
        torch.save(state, path)
    except (
        pickle.PicklingError,
        AttributeError,
        TypeError,
    ) as error:  # what pickle raises, by the kind of object
        raise ConfigError(f"What is kept must be possible to save, but {what} isn't: {error}") from error
    check_loadable(path, what, arrays=True)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
