"""Metrics on disk, found again by the content of the weight that they were measured on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from layersample.files import cache_folder

logger = logging.getLogger(__name__)

_FORMAT = "layersample-metric-1"


def hash_weight(weight: Tensor) -> str:
    """Return a hash of a weight's type, shape and values."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class MetricCache:
    """Values of metrics, a small JSON file each.

    A file is written under a temporary name and renamed, so that no reader sees half of one. A cache that
    can't be read or written costs a warning and the time to measure again, never a run.

    Args:
        folder: Where the files lie; by default ``metrics`` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "metrics" if folder is None else folder

    def load(self, weight_hash: str, metric: str, parameters: Mapping[str, float]) -> float | None:
        """Return a stored value, or None: there is none, or its file is corrupt or foreign."""
        key = _key(weight_hash, metric, parameters)
        path = self._path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("Measuring again: the cache file %s can't be read (%s).", path, error)
            return None
        value = _parse(text, key)
        if value is None:
            logger.warning(
                "Measuring again: the cache file %s is corrupt or not of layersample's making.", path
            )
        return value

    def store(self, weight_hash: str, metric: str, parameters: Mapping[str, float], value: float) -> None:
        """Write a value; one that isn't finite is never stored."""
        if not math.isfinite(value):
            return
        key = _key(weight_hash, metric, parameters)
        text = json.dumps({"format": _FORMAT, "key": key, "metric": metric, "value": value})
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.folder, suffix=".tmp", delete=False
            ) as file:
                temporary = Path(file.name)
                file.write(text)
            os.replace(temporary, self._path(key))
        except OSError as error:
            logger.warning("Metrics aren't cached: %s can't be written (%s).", self.folder, error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def _key(weight_hash: str, metric: str, parameters: Mapping[str, float]) -> str:
    content = json.dumps([weight_hash, metric, dict(parameters)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _parse(text: str, key: str) -> float | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != _FORMAT or record.get("key") != key:
        return None
    value = record.get("value")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
