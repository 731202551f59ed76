"""What `layersample train` does on one rank of a launcher, and the runs that are compared; run by ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layersample.config import make_config
from layersample.training.finetune import finetune
from layersample.training.models import load_model

OPTIONS: dict[str, Any] = {
    "steps": 6,
    "period": 2,
    "eval_size": 4,
    "learning_rate": 1e-2,
    "max_length": 16,
    "batch_size": 2,
    "check": True,
}


def top(folder: Path) -> Path:
    """Where the model and the data are."""
    return next(path for path in (folder, *folder.parents) if (path / "sums.jsonl").exists())


def train(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """A run in a folder; the model and the data are in it, or above."""
    above = top(folder)
    given = {"model": str(above / "tiny"), "data": str(above / "sums.jsonl"), "output": str(folder / name)}
    return finetune(make_config(("test", {**OPTIONS, **given, **options})))


def train_double(folder: Path, name: str, **options: Any) -> None:
    """The same with weights of 64 bits, which the command has no option for."""

    def load(model: str, dtype: torch.dtype, report: Any) -> Any:
        return load_model(model, torch.float64, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layersample.training.finetune.load_model", load)
        train(folder, name, **options)


def check_shards_in_mixed_precision(folder: Path) -> None:
    train(folder, "bf16", shard="fsdp2", precision="bf16-mixed", batch_size=4)


def check_a_run_of_two_ranks_in_shards_is_resumed_on_one(folder: Path) -> None:
    train(top(folder), "two", shard="fsdp2", resume=True)
