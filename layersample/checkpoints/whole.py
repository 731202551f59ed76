"""Checkpoints that are whole or not there: sealed with a list of their files, and checked before they are used."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from layersample.errors import ConfigError
from layersample.files import replace_folder, write_json

logger = logging.getLogger(__name__)

SEAL = "layersample.json"
_VERSION = 1


class CheckpointError(ConfigError):
    """A checkpoint can't be used: says why, and which earlier one can."""


class Stateful(Protocol):
    """Whatever has a state to be kept: a model, an optimizer, a learning-rate schedule, a scheduler, a loader."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it back."""


def seal(folder: Path) -> None:
    """List a finished checkpoint's files and their bytes in it, so that :func:`check` can tell what is missing."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    write_json(folder / SEAL, {"version": _VERSION, "files": files})


def check(folder: Path) -> None:
    """Make sure that a checkpoint is one of ours, and whole.

    Raises:
        CheckpointError: If it was made without layersample or by another version, or a file of it is missing or
            has another size; it offers the last whole checkpoint beside it.
    """
    problem = _find_problem(folder)
    if problem is not None:
        others = [p for p in _numbered(folder.parent) if p != folder and _find_problem(p) is None]
        offer = (
            f"The last whole checkpoint is {others[-1]}." if others else "There is no other whole checkpoint."
        )
        raise CheckpointError(f"The checkpoint {folder} can't be used: {problem}. {offer}")


def find_last(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a folder, whole or not; ``None`` without any."""
    checkpoints = _numbered(folder)
    return checkpoints[-1] if checkpoints else None


def step_of(checkpoint: Path) -> int:
    """The number in ``checkpoint-NUMBER``."""
    return int(checkpoint.name.rpartition("-")[2])


class Checkpoints:
    """Saves and loads the checkpoints of a plain training loop, each whole or not at all.

    A run that is killed at any moment goes on from its last checkpoint to the same bits as one that wasn't: the
    state of torch's and Python's random generators is kept too. Make the objects as for a new run, then call
    :meth:`load_last`.

    Args:
        folder: Where the checkpoints are: ``checkpoint-STEP`` each.
        objects: What is kept, by name, in the order in which it is loaded: the model first, then the optimizer,
            then its schedule and the :class:`~layersample.LayerScheduler`.
        keep: How many of the last checkpoints stay, at least 1.

    Raises:
        ConfigError: If ``keep`` is out of bounds or an object has no state.

    Example:
        >>> checkpoints = Checkpoints("run", {"model": model, "optimizer": optimizer})  # doctest: +SKIP
        >>> for step in range(checkpoints.load_last(), 1000):  # doctest: +SKIP
        ...     train(step)
        ...     if (step + 1) % 100 == 0:
        ...         checkpoints.save(step + 1)
    """

    def __init__(self, folder: str | Path, objects: Mapping[str, Stateful], *, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigError(f"keep must be at least 1 checkpoint, but got keep={keep}.")
        for name, value in objects.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise ConfigError(
                    f"What is kept must have state_dict and load_state_dict, but {name!r} ({type(value).__name__}) "
                    "hasn't."
                )
        self.folder, self.keep = Path(folder), keep
        self._objects = dict(objects)

    def save(self, step: int) -> Path:
        """Write a checkpoint, and remove the oldest ones only once it is whole.

        Args:
            step: Optimizer steps done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch, target = saving_folder(self.folder, step), self.folder / f"checkpoint-{step}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        for name, value in self._objects.items():
            torch.save(value.state_dict(), scratch / f"{name}.pt")
        torch.save(_random_state(), scratch / "random.pt")
        seal(scratch)
        replace_folder(scratch, target)
        for old in _numbered(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        return target

    def load_last(self) -> int:
        """Load the last checkpoint.

        Returns:
            Optimizer steps done; 0 where there is no checkpoint.

        Raises:
            CheckpointError: As :func:`check` and :meth:`load`.
        """
        last = find_last(self.folder)
        return 0 if last is None else self.load(last)

    def load(self, checkpoint: str | Path) -> int:
        """Load one checkpoint.

        Raises:
            CheckpointError: As :func:`check`; or if it holds other objects than these.
        """
        checkpoint = Path(checkpoint)
        check(checkpoint)
        held = {path.stem for path in checkpoint.glob("*.pt")} - {"random"}
        if held != set(self._objects):
            raise CheckpointError(
                f"The checkpoint {checkpoint} must hold {', '.join(sorted(self._objects))}, but holds "
                f"{', '.join(sorted(held)) or 'nothing'}."
            )
        states = {name: torch.load(checkpoint / f"{name}.pt", weights_only=True) for name in self._objects}
        for name, value in self._objects.items():
            value.load_state_dict(states[name])
        _set_random_state(torch.load(checkpoint / "random.pt", weights_only=True))
        return step_of(checkpoint)


def saving_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole; the same for all ranks."""
    return folder / f".saving-{step}"


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that was killed had begun to save."""
    for leftover in folder.glob(".saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _find_problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        version, files = content["version"], dict(content["files"])
    except FileNotFoundError:
        return f"it has no {SEAL}, so it wasn't saved by layersample"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {SEAL} is damaged"
    if version != _VERSION:
        return f"it is of version {version}, and this layersample reads version {_VERSION}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} is damaged: it must have {size} bytes, but has {path.stat().st_size}"
    return None


def _numbered(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


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
