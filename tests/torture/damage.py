"""Random damage to a checkpoint: it is refused, or changes nothing."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import torch

from layersample.checkpoints.seal import CheckpointError, find_last
from tests.torture import loops

CASE = {
    "loop": "plain",
    "sampler": "lisa",
    "num_active": 2,
    "period": 3,
    "state": "keep",
    "granularity": "layer",
    "inactive": "freeze",
    "frozen_weights": None,
    "switch_warmup": 0,
    "projection": None,
    "options": {},
    "bf16": True,
    "steps": 6,
    "save": 2,
    "keep": 2,
}


class Damage:
    """Damages copies of a run's last checkpoint.

    Args:
        folder: For the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._whole, self._copy = folder / "whole", folder / "copy"
        self._result = loops.run(CASE, self._whole, folder)

    def damage(self, rng: random.Random) -> tuple[str, str | None]:
        """Do one damage.

        Returns:
            What was done, and what is wrong with what came of it, if anything.
        """
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._whole, self._copy)
        last = find_last(self._copy)
        assert last is not None
        file = rng.choice(sorted(last.iterdir()))
        did = f"{_damage(file, rng)} {file.name}"
        try:
            ended = loops.run(CASE, self._copy, self._copy)
        except CheckpointError:
            return did, None
        same = all(torch.equal(value, ended[name]) for name, value in self._result.items())
        return did, None if same else "was loaded, and the end differs"


def _damage(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    kind = rng.choice(("flip a bit of", "cut", "remove", "lengthen", "blank a part of", "exchange"))
    at = rng.randrange(len(data))
    if kind == "flip a bit of":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "lengthen":
        data += os.urandom(1)
    elif kind == "blank a part of":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "exchange":  # with that of the checkpoint before
        other = sorted(p for p in file.parent.parent.iterdir() if p != file.parent)[0] / file.name
        data = bytearray(other.read_bytes())
    if kind == "remove":
        file.unlink()
    else:
        file.write_bytes(data)
    return kind
