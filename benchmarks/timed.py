"""A model that trains step by step under a clock of CPU seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layersample import LayerScheduler


@dataclass
class TimedRun:
    """A model with what trains it, and the CPU seconds of each step, over all threads."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: LayerScheduler
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step."""
        started = time.process_time()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.cpu_seconds.append(time.process_time() - started)
