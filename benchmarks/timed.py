"""A model that trains step by step under a clock of CPU seconds, and the text that it trains on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layersample import LayerScheduler
from layersample.training.data import load_data
from layersample.training.models import load_model


@dataclass
class TimedRun:
    """A model with what trains it, and the CPU seconds of each step, over all threads."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LayerScheduler | None
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step."""
        started = time.process_time()
        # A cache of keys and values is of no use in training, but a model makes one unless it is told.
        self.model(**batch, use_cache=False).loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.cpu_seconds.append(time.process_time() - started)


def ratios(own: Sequence[float], others: Sequence[float]) -> list[float]:
    """What something took over what another one took in the same round."""
    return [mine / theirs for mine, theirs in zip(own, others, strict=True)]


def real_batches(folder: str, batch: int = 4, length: int = 128) -> list[dict[str, Tensor]]:
    """Worked problems as unbroken text, cut into batches without padding.

    Args:
        folder: Folder of the model whose tokenizer cuts it, or a built-in name.
        batch: Examples of each.
        length: Tokens of an example.
    """
    _, tokenizer = load_model(folder)
    text = "\n".join(
        row["prompt"] + row["completion"] for row in load_data("gsm_symbolic").select(range(400))
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // (batch * length) * batch * length].view(-1, batch, length)
    return [{"input_ids": tokens, "labels": tokens} for tokens in ids]
