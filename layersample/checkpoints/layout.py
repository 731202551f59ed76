"""How the optimizer's state lies in a Trainer's checkpoint: whole, of a model in shards, or in the parts of ranks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from layersample.checkpoints.seal import CheckpointError


class Layout(StrEnum):
    """How a run saves the state of its optimizer, in words."""

    WHOLE = "of whole parameters, as one process or DistributedDataParallel saves it"
    SHARDS_IN_PARTS = "of parameters in shards (FSDP2), in a part of each rank"
    SHARDS_IN_ONE_FILE = "of parameters in shards (FSDP2), in one file"


_HOW = {
    Layout.WHOLE: "without shards: leave out --shard, or the Trainer's fsdp",
    Layout.SHARDS_IN_PARTS: "in shards: --shard fsdp2 --sharded-checkpoints, or the Trainer's fsdp with "
    "SHARDED_STATE_DICT",
    Layout.SHARDS_IN_ONE_FILE: "in shards: --shard fsdp2 --no-sharded-checkpoints, or the Trainer's fsdp with "
    "FULL_STATE_DICT",
}


def layout_of(*, shards: bool, in_parts: bool) -> Layout:
    """The layout that a run writes, and reads.

    Args:
        shards: Whether the model is in shards.
        in_parts: Whether each rank then writes its part.
    """
    if not shards:
        return Layout.WHOLE
    return Layout.SHARDS_IN_PARTS if in_parts else Layout.SHARDS_IN_ONE_FILE


def check_layout(checkpoint: Path, wanted: Layout) -> None:
    """Make sure that a run reads the optimizer's state in a checkpoint as it lies there.

    accelerate looks for the file that it would write now: without it, it fails somewhere inside, or goes on without
    state.

    Args:
        checkpoint: The checkpoint.
        wanted: What the run reads.

    Raises:
        CheckpointError: If the checkpoint has another layout. One that holds no optimizer passes.
    """
    found = _layout_in(checkpoint)
    if found is not None and found != wanted:
        raise CheckpointError(
            f"A run must be resumed in shards or not, as it was begun, but the checkpoint {checkpoint} holds "
            f"optimizer state {found}, and this run's would be {wanted}. Resume it {_HOW[found]}."
        )


def _layout_in(checkpoint: Path) -> Layout | None:
    if (checkpoint / "optimizer_0").is_dir():
        return Layout.SHARDS_IN_PARTS
    if (checkpoint / "optimizer.bin").is_file():
        return Layout.SHARDS_IN_ONE_FILE
    return Layout.WHOLE if (checkpoint / "optimizer.pt").is_file() else None
