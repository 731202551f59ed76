"""The weights in a folder of safetensors, read one at a time, and one hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from layersample.errors import ConfigError
from layersample.model_files import reason


class SavedTensors:
    """The weights of a saved model, whose files are opened once and read only where they are asked for.

    Args:
        folder: The folder, with ``model.safetensors`` or the files that an index names.

    Raises:
        ConfigError: If there are none, or they can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, list[str]] = {}  # names of weights by file, in the file's own order
        self._open: dict[str, Any] = {}
        for name in _weight_files(folder):
            self._open[name] = open_file(folder / name)
            self.files[name] = list(self._open[name].keys())
        self._file_of = {weight: file for file, weights in self.files.items() for weight in weights}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        return tensor

    def metadata(self, file: str) -> dict[str, str]:
        """What a file says of itself."""
        return dict(self._open[file].metadata() or {})


def open_file(path: Path) -> Any:
    """Open a file of safetensors.

    Raises:
        ConfigError: If it isn't there, or is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: must be a whole file of safetensors, but: {reason(error)}") from error


def digest(tensor: Tensor) -> str:
    """A hash of a weight: its type, its shape and every bit of it."""
    head = f"{dtype_name(tensor.dtype)} {list(tensor.shape)} ".encode()
    found = hashlib.sha256(head)
    found.update(as_bytes(tensor).numpy().data)
    return found.hexdigest()


def content_hash(digests: Mapping[str, str]) -> str:
    """One hash of all weights, however they are spread over files.

    Args:
        digests: The hash of each, by name.
    """
    text = "".join(f"{json.dumps(name)} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bits of a weight; two that differ in the sign of a zero, or in a NaN's payload, differ here."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type, as torch has it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _weight_files(folder: Path) -> list[str]:
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # from_pretrained takes it before an index, too
        return [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ConfigError(
            f"The model in {folder} must be saved as safetensors, but there is no {SAFE_WEIGHTS_NAME}: load it with "
            'transformers and save it by model.save_pretrained("folder").'
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index}: must be an index of weights, but it can't be read as one.") from error
    return [check_inside(str(name), index) for name in names]


def check_inside(name: str, source: Path) -> str:
    """Make sure that a path, which comes from a file, stays within its folder.

    Raises:
        ConfigError: If it doesn't.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{source}: a file's name must stay within the folder, but it names {name!r}.")
    return name
