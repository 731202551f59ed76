"""The other ways to train that a plan shows beside a run."""

from __future__ import annotations

from typing import Any

import yaml

from layersample.plugins import settings_files


def common_options() -> dict[str, Any]:
    """Options of a run as it is commonly done, without anything of ours that saves memory."""
    common: dict[str, Any] = _read()["common"]
    return common


def compared_rows() -> dict[str, dict[str, Any]]:
    """Options of each way by its name; ``lora_rank`` stands for adapters on all linear layers."""
    return {name: {**common_options(), **row} for name, row in _read()["rows"].items()}


def _read() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(settings_files("comparisons")["plan"])
    return read
