"""Files and folders that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from layersample.errors import ConfigError, short

LOCK = ".lock"
_LONGEST_NAME = 255  # bytes of a file's name, on every file system in common use


def cache_folder() -> Path:
    """Where models and metrics are kept: ``$LAYERSAMPLE_CACHE``, or the user's cache folder."""
    override = os.environ.get("LAYERSAMPLE_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("layersample")


def check_output(path: Path, what: str = "output folder") -> None:
    """Make sure, before any work, that a path can be written; nothing new stays there.

    Args:
        path: Of a file or folder that needn't be there yet.
        what: What it is called in messages.

    Raises:
        ConfigError: If no file or folder can be there: a name that is too long, links in a circle or to nowhere, a
            parent that is a file or can't be written.
    """
    try:
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, f"a name has at most {_LONGEST_NAME} bytes")
        if path.is_symlink() and not path.exists():
            raise OSError(errno.ENOENT, "it is a link to nowhere, or in a circle")
        there = next(parent for parent in (path, *path.absolute().parents) if _is_there(parent))
        if there != path and not there.is_dir():
            raise OSError(errno.ENOTDIR, f"{there} is a file")
        if not os.access(there, os.W_OK):
            raise OSError(errno.EACCES, f"there is no permission to write {there}")
        if (
            there.is_dir()
        ):  # what the permissions say isn't all: a system of files may be read-only, or no disk
            os.rmdir(tempfile.mkdtemp(prefix=".layersample-", dir=there))
    # ValueError: a NUL character; RuntimeError: a circle
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"The {what} must be writable, but for {short(str(path))}: {reason}.") from error


def check_output_file(path: Path, what: str) -> None:
    """As :func:`check_output`, for a file whose folder must be there.

    Raises:
        ConfigError: If it can't be written, is a folder, or its folder is missing.
    """
    check_output(path, what)
    if path.is_dir():
        raise ConfigError(f"The {what} must be a file, but {short(str(path))} is a folder.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"The {what} must lie in a folder that exists, but there is no {str(path.parent)!r}."
        )


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # below a file: the file itself is looked at next
        return False
    return True


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a folder while something is written into it, so that no second run mixes with it.

    The system lets go of it when the process ends, however it does. The lock's file stays: removing it would let two
    processes hold two files of one name.

    Args:
        folder: The folder, which is there.

    Raises:
        ConfigError: If another process, or another run of this one, holds it.
        OSError: If it can't be written.
    """
    from filelock import FileLock, Timeout  # only the command line and runs need it

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"One run at a time may write into a folder, but {folder} is in use by another one: choose another "
            "output, or wait until that one has ended."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside a file's place, and rename what was written there at the end."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield scratch
    os.replace(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: another process sees the old one or the new one."""
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, readable for people."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def replace_folder(new: Path, target: Path) -> None:
    """Move a finished folder to its place. Whatever was there is gone only once the new one is in place."""
    sync_folder(new)
    if target.exists() and _swap(new, target):
        shutil.rmtree(new, ignore_errors=True)  # what was there before
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Let two folders change places at once, so that neither is ever missing; False where the system can't."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Python's own os has no such function
    if rename is None:
        return False
    from_here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(rename(from_here, os.fsencode(one), from_here, os.fsencode(other), exchange) == 0)


def sync_folder(folder: Path) -> None:
    """Force a folder's files to disk, so that a rename can't come before their content."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
