"""What `layersample train` does on one rank of a launcher, and the runs that are compared; run by ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersample.config import make_config
from layersample.training.finetune import finetune

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


def check_shards_in_mixed_precision(folder: Path) -> None:
    train(folder, "bf16", shard="fsdp2", precision="bf16-mixed", batch_size=4)


def check_a_run_of_two_ranks_in_shards_is_resumed_on_one(folder: Path) -> None:
    train(top(folder), "two", shard="fsdp2", resume=True)
