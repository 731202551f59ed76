"""One run of a benchmark, and what its method is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["peak", "timing", "whole", "search", "runoff", "rung", "final"]
# What these measure is the same at any learning rate.
WITHOUT_RATE: tuple[Stage, ...] = ("peak", "timing", "whole")
_PARTS: dict[Stage, str] = {"peak": "seed", "timing": "round", "whole": "seed", "final": "seed"}


@dataclass(frozen=True)
class Given:
    """What a method may use, so that it can be compared with the others.

    Args:
        steps: Optimizer steps of a run.
        search_steps: Optimizer steps of a run that tries a learning rate.
        options: Options of ``layersample train`` that were chosen for it.
    """

    steps: int
    search_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run, in a process of its own.

    Args:
        row: Name of the method's row.
        stage: ``"peak"``, ``"timing"`` and ``"whole"`` measure what a method takes, the last one with as many steps as
            are thought to fit; ``"search"`` tries a learning rate, measured on the validation split, ``"runoff"`` one
            of the best with another seed, and ``"rung"`` a recipe; ``"final"`` is measured on the test split.
        seed: Seed of data order, dropout and draws; of a timing, its round.
        learning_rate: The peak.
        steps: Optimizer steps.
        options: Options of ``layersample train`` that the match chose.
    """

    row: str
    stage: Stage
    seed: int
    learning_rate: float
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name among all runs of a benchmark."""
        if self.stage == "search":
            return f"search/{self.row}/rate-{self.learning_rate:g}"
        if self.stage == "runoff":
            return f"runoff/{self.row}/rate-{self.learning_rate:g}/seed-{self.seed}"
        if self.stage == "rung":
            return f"rung/{self.row}/steps-{self.steps}/seed-{self.seed}"
        return f"{self.stage}/{self.row}/{_PARTS[self.stage]}-{self.seed}"
