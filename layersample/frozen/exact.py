"""Exact values of frozen weights: in the host's memory, or in the file that they were mapped from."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from layersample.errors import ConfigError


@dataclass(frozen=True)
class MappedFile:
    """A file that a tensor's memory is mapped from, as it was then.

    Args:
        path: Where it is.
        stamp: Its device, inode, size and time of its last change.
    """

    path: str
    stamp: tuple[int, int, int, int]

    def check(self) -> None:
        """Make sure that the file is still what it was.

        Raises:
            ConfigError: If it has changed, or is there no more.
        """
        if (now := _stamp(self.path)) == self.stamp:
            return
        what = "is there no more" if now is None else "has changed"
        raise ConfigError(
            f"The file {self.path} must stay as it is while frozen weights are read from it, but it {what}: layers "
            "that haven't trained have their exact values only there. Those that have trained are in memory: "
            "save scheduler.trained_state_dict(), then load the model anew."
        )


class Mappings:
    """The files that are mapped into this process now; none where the system doesn't list them."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int, int, str]] = []  # begin, end, inode, path
        maps = Path("/proc/self/maps")
        if maps.is_file():
            for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
                parts = line.split(maxsplit=5)
                if len(parts) == 6 and parts[4] != "0" and not parts[5].startswith("/dev/"):
                    begin, end = (int(number, 16) for number in parts[0].split("-"))
                    self._regions.append((begin, end, int(parts[4]), parts[5]))
        self._regions.sort()

    def file_of(self, tensor: Tensor) -> MappedFile | None:
        """The file that holds a tensor's memory; None where it is memory of the process's own."""
        if tensor.device.type != "cpu" or type(tensor.data) is not Tensor or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect_right(self._regions, (address, 2**64)) - 1
        if index < 0:
            return None
        _, end, inode, path = self._regions[index]
        stamp = _stamp(path)
        # A file that was replaced since has another inode: what is mapped is in no file that has a name.
        inside = address + tensor.nbytes <= end
        return MappedFile(path, stamp) if inside and stamp is not None and stamp[1] == inode else None


def _stamp(path: str) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_host(needed: int, form: str) -> None:
    """Make sure that the host's memory suffices for exact values, once every layer has trained.

    Args:
        needed: Bytes that will be kept there, and aren't yet.
        form: Name of the format.

    Raises:
        ConfigError: If it doesn't; with both figures.
    """
    there = available_memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"frozen_weights={form!r} keeps the exact values of the layers in the host's memory, with what masters "
            f"hold beyond them, which takes up to {needed / 2**30:.2f} GiB once all of them have trained, but only "
            f"{there / 2**30:.2f} GiB are available there: use a host with more memory, a smaller model, or "
            "master_weights=False, which halves it."
        )


def available_memory() -> int | None:
    """Bytes of the host's memory that can be had without swapping; None where the system doesn't say."""
    file = Path("/proc/meminfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
