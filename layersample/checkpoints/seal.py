"""The seal of a checkpoint: a list of its files with sizes and checksums, and when it was saved among the others."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersample.checkpoints.checksums import checksums
from layersample.checkpoints.saving import saving_folder
from layersample.errors import ConfigError
from layersample.files import write_json

SEAL = "layersample.json"
_VERSION = 2
_READ = (1, _VERSION)  # version 1 has sizes alone, and no order
_EDITABLE = ("trainer_state.json",)  # the Trainer's, in which people move folders and change intervals


class CheckpointError(ConfigError):
    """A checkpoint can't be used: says why, and which earlier one can."""


class _SealError(Exception):
    """What is wrong with a seal."""


@dataclass(frozen=True)
class _Seal:
    """What a seal says.

    Args:
        number: How many checkpoints had been saved in the folder, this one included; 0 if that isn't known.
        sizes: Bytes of each file, by its path in the checkpoint.
        checksums: Checksum of each file, where it is known.
    """

    number: int
    sizes: Mapping[str, int]
    checksums: Mapping[str, str]


def seal(folder: Path, number: int = 1) -> None:
    """List a finished checkpoint's files, bytes and checksums in it, so that :func:`check` can tell what is wrong.

    Args:
        folder: The checkpoint.
        number: Of :func:`next_number`, in the folder where the checkpoint will be.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SEAL]
    found = checksums(paths)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": found[path]}
        for path in paths
    }
    content = {"version": _VERSION, "number": number, "files": files}
    write_json(folder / SEAL, {**content, "crc32": _checksum(content)})


def check(folder: Path, *, verify: bool = True, allow_changes: bool = False) -> None:
    """Make sure that a checkpoint is one of ours, and whole.

    Args:
        folder: The checkpoint.
        verify: Whether to read all files and compare their checksums, and not only their sizes.
        allow_changes: Whether the Trainer's ``trainer_state.json`` may have been edited since.

    Raises:
        CheckpointError: If it was made without layersample or by another version, or a file of it is missing, or
            isn't as it was saved; it offers the last whole checkpoint beside it.
    """
    problem = _find_problem(folder, verify, allow_changes)
    if problem is not None:
        others = reversed([path for path in in_order(folder.parent) if path != folder])
        whole = next((path for path in others if _find_problem(path, verify, allow_changes) is None), None)
        offer = f"The last whole checkpoint is {whole}." if whole else "There is no other whole checkpoint."
        raise CheckpointError(f"The checkpoint {folder} can't be used: {problem}. {offer}")


def check_resumable(checkpoint: Path) -> None:
    """Make sure that a Trainer's checkpoint holds the optimizer, and not the model alone.

    Raises:
        CheckpointError: If it doesn't.
    """
    try:
        files = _read(checkpoint).sizes
    except _SealError:  # which check() tells
        return
    if files and not any(file.startswith("optimizer") for file in files):
        raise CheckpointError(
            f"A run must be resumed with its optimizer, but the checkpoint {checkpoint} holds the model alone, as "
            "save_only_model asks for: load the model from it and begin a new run, or save without that option."
        )


def find_last(folder: Path) -> Path | None:
    """The checkpoint that was saved last in a folder, whole or not; ``None`` without any.

    That isn't the one with the highest step, where a run has gone back to an earlier one.
    """
    checkpoints = in_order(folder)
    return checkpoints[-1] if checkpoints else None


def in_order(folder: Path, *, damaged_first: bool = False) -> list[Path]:
    """The checkpoints in a folder, from the first saved to the last.

    The order is that of a counter in their seals: clocks change, and steps repeat where a run has gone back.

    Args:
        folder: Where they are: ``checkpoint-STEP`` each.
        damaged_first: Whether those whose seal can't be read all stand first; by default one with the highest step
            stands last, so that the damage is told.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    numbers: dict[Path, float] = {}
    for checkpoint in found:
        try:
            numbers[checkpoint] = _read(checkpoint).number
        except _SealError:
            continue
    highest = max(map(step_of, numbers), default=-1)

    def place(checkpoint: Path) -> tuple[float, int]:
        unreadable = math.inf if step_of(checkpoint) > highest and not damaged_first else -1
        return numbers.get(checkpoint, unreadable), step_of(checkpoint)

    return sorted(found, key=place)


def last_number(folder: Path) -> int:
    """The highest number of a checkpoint in a folder; 0 without any."""
    numbers = [0]
    for checkpoint in in_order(folder):
        try:
            numbers.append(_read(checkpoint).number)
        except _SealError:
            continue
    return max(numbers)


def remove_oldest(folder: Path, keep: int, *, spare: Collection[Path] = ()) -> None:
    """Remove all but the last checkpoints of a folder; those that layersample didn't make stay.

    Args:
        folder: The folder.
        keep: How many stay.
        spare: Checkpoints that stay too, and are among the ``keep``.
    """
    ours = [path for path in in_order(folder, damaged_first=True) if (path / SEAL).exists()]
    stay = {*spare, *ours[-1:]} & set(ours)
    excess = len(ours) - max(keep, len(stay))
    for old in [path for path in ours if path not in stay][: max(excess, 0)]:
        aside = saving_folder(folder, step_of(old))  # a kill must not leave a part of it under its name
        old.rename(aside)
        shutil.rmtree(aside)


def step_of(checkpoint: Path) -> int:
    """The number in ``checkpoint-NUMBER``."""
    return int(checkpoint.name.rpartition("-")[2])


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _read(checkpoint: Path) -> _Seal:
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _SealError(f"it has no {SEAL}, so it wasn't saved by layersample") from None
    except (OSError, ValueError):
        raise _SealError(f"its {SEAL} is damaged") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise _SealError(f"its {SEAL} is damaged")
    version, files = content.get("version"), content["files"]
    if version not in _READ:
        raise _SealError(f"it is of version {version}, and this layersample reads version {_VERSION}")
    if version == 1:
        return _Seal(0, files, {})
    if _checksum({key: value for key, value in content.items() if key != "crc32"}) != content.get("crc32"):
        raise _SealError(f"its {SEAL} is damaged")
    sizes = {name: file["bytes"] for name, file in files.items()}
    return _Seal(content["number"], sizes, {name: file["crc32"] for name, file in files.items()})


def _find_problem(folder: Path, verify: bool, allow_changes: bool) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    try:
        found = _read(folder)
    except _SealError as error:
        return str(error)
    for name, size in found.sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size and not (allow_changes and name in _EDITABLE):
            return _differs(name, f"it must have {size} bytes, but has {path.stat().st_size}")
    if verify:
        looked_at = [name for name in found.checksums if not (allow_changes and name in _EDITABLE)]
        now = checksums(folder / name for name in looked_at)
        for name in looked_at:
            if now[folder / name] != found.checksums[name]:
                return _differs(name, "its content isn't what was saved")
    return None


def _differs(name: str, how: str) -> str:
    if name in _EDITABLE:
        return (
            f"its file {name} is damaged or edited: {how}; if you have edited it, allow that with allow_changes=True "
            "(--allow-changes)"
        )
    return f"its file {name} is damaged: {how}"
