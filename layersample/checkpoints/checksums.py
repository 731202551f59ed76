"""Checksums of large files, by several threads: damage of the same size is seen, a flipped bit always."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Files are read in parts, so that one large file keeps all threads busy. A part of a seal's format.
PART = 16 * 2**20
_THREADS = 8


def checksums(files: Iterable[Path]) -> dict[Path, str]:
    """The checksum of each file: 8 hexadecimal digits.

    CRC-32 finds every burst of damage up to 32 bits, and misses others once in 4 billion times. It is no
    protection against someone who means harm. It reads about 2 GB/s a thread, twice as fast as SHA-256 or BLAKE2.

    Args:
        files: The files.

    Returns:
        By file: CRC-32 of the list of the CRC-32s of its parts of 16 MiB.
    """
    parts = [(file, start) for file in files for start in range(0, max(file.stat().st_size, 1), PART)]
    sums: dict[Path, bytes] = {}
    # Not more threads than processors: each holds a part in memory, and zlib needs a processor of its own.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for (file, _), found in zip(parts, threads.map(_of_part, parts), strict=True):
            sums[file] = sums.get(file, b"") + found.to_bytes(4, "big")
    return {file: f"{zlib.crc32(found):08x}" for file, found in sums.items()}


def _of_part(part: tuple[Path, int]) -> int:
    path, start = part
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        found, left = 0, PART
        while left and (block := file.read(min(left, 2**20))):
            found, left = zlib.crc32(block, found), left - len(block)
    return found
