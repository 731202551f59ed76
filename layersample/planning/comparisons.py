"""The other ways to train that a plan shows beside a run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import yaml

from layersample.config import TrainConfig
from layersample.plugins import settings_files


@dataclass(frozen=True)
class ComparedRow:
    """Another way to train the run's model on the run's batch.

    Args:
        own_terms: Its options on the run's own terms: precision, masters, checkpointing, loss and so on.
        as_common: Its options as it is commonly run, without anything of ours that saves memory; ``None`` where
            that is the same.
        lora_rank: Rank of adapters on all linear layers, which train in place of layers; ``None`` for layers.
    """

    own_terms: TrainConfig
    as_common: TrainConfig | None
    lora_rank: int | None


def common_options() -> dict[str, Any]:
    """Options of a run as it is commonly done, without anything of ours that saves memory."""
    read = _read()
    return {**read["method"], **read["common"]}


def compared_rows(config: TrainConfig) -> dict[str, ComparedRow]:
    """Each other way by its name; adapters only where peft is installed.

    Args:
        config: The run's options.
    """
    read = _read()
    rows = {}
    for name, row in read["rows"].items():
        options = {**read["method"], **row}
        lora_rank = options.pop("lora_rank", None)
        if lora_rank is not None and find_spec("peft") is None:
            continue
        own = config.model_copy(update=options)
        common = config.model_copy(update={**options, **read["common"]})
        rows[name] = ComparedRow(own, None if common == own else common, lora_rank)
    return rows


def _read() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(settings_files("comparisons")["plan"])
    return read
