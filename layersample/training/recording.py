"""What a run measures of itself: losses, active layers and bytes at every step, and the peaks of memory."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layersample.errors import ConfigError
from layersample.files import write_text
from layersample.optim.memory_use import MemoryUse, measure_memory
from layersample.scheduling.scheduler import LayerScheduler

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows a run while it goes on."""

    def begin(self, steps: int, done: int) -> None:
        """Training begins; ``done`` steps were done before."""

    def evaluate(self, batch: int, batches: int) -> None:
        """One more batch of held-out data is done."""

    def held_out(self, step: int, loss: float) -> None:
        """An evaluation has ended."""

    def step(self, record: dict[str, Any]) -> None:
        """A step has ended; ``record`` is its line in metrics.jsonl."""

    def end(self) -> None:
        """Training has ended, well or not."""


class RunRecorder(TrainerCallback):
    """Writes ``metrics.jsonl``, one line an optimizer step, and keeps the peaks of memory.

    Put it behind the sampling callback, so that the logs hold the active layers; and its :attr:`clock` in front of
    that, so that a step's seconds are with those of the switch before it, and the first one's with those of what the
    sampler measures as training begins. Evaluations and checkpoints aren't in any step's.

    Args:
        path: The file; replaced, unless a run is resumed. ``None`` on ranks that don't write.
        scheduler: Gives the layer scheduler, once training has begun.
        records: What a resumed run did before, of :func:`read_records`.
        progress: Shows each step.
    """

    def __init__(
        self,
        path: Path | None,
        scheduler: Callable[[], LayerScheduler | None],
        *,
        records: Sequence[dict[str, Any]] = (),
        progress: Progress | None = None,
    ) -> None:
        self.path = path
        self.records = list(records)
        self.peak = MemoryUse(0, 0, 0)
        self._now = self.peak
        self._scheduler = scheduler
        self._progress = progress
        self.clock = SwitchClock()
        self._trainable = self._moving = 0
        self._evaluated = 0
        # A resumed run goes on in the period of its last record, whose probabilities are written.
        self._round: int | None = next((r["round"] for r in reversed(self.records) if "round" in r), None)
        for record in self.records:
            if "bytes" in record:
                self._raise_peak(MemoryUse(**record["bytes"]))
        if path is not None:
            write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar; keep what sampling took to begin."""
        self.clock.pause()
        if self._progress:
            self._progress.begin(state.max_steps, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count bytes while the optimizer has all of its state and the gradients are still there."""
        use = measure_memory(kwargs["model"], kwargs["optimizer"])
        scheduler = self._scheduler()
        if scheduler is not None:  # gradients that a step in the backward pass has freed already
            use = replace(use, gradients=max(use.gradients, scheduler.largest_gradient))
        self._raise_peak(use)
        moving = frozenset() if scheduler is None else scheduler.moving_parameters
        sizes = {name: p.numel() for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        self._moving = sum(sizes.pop(name, 0) for name in moving)
        self._trainable = sum(sizes.values())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the Trainer log each step, whatever its ``logging_steps``: there is a line a step.

        With frozen weights also evaluate the last step, while they are still as they were trained with.
        """
        control.should_log = True
        scheduler = self._scheduler()
        if scheduler is not None and scheduler.frozen is not None and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line of a step, or of an evaluation."""
        if logs and "eval_loss" in logs:
            self._write({"step": state.global_step, "held_out_loss": logs["eval_loss"]})
            if self._progress:
                self._progress.held_out(state.global_step, logs["eval_loss"])
        elif logs and "saved_loss" in logs:
            self._write({"step": state.global_step, "held_out_loss_as_saved": logs["saved_loss"]})
        elif logs and "loss" in logs:
            scheduler = self._scheduler()
            assert scheduler is not None
            record = {
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm", scheduler.gradient_norm),
                "round": scheduler.round,
                "active": list(scheduler.active),
                "coverage": scheduler.coverage,
                "staleness": max(scheduler.staleness),
                "trainable_parameters": self._trainable,
                "bytes": asdict(self._now),
                "seconds": round(self.clock.stop(), 4),
            }
            if scheduler.options.inactive != "freeze":
                record["moving_parameters"] = self._moving
            if scheduler.round != self._round:  # once a period
                self._round = scheduler.round
                record["inclusion_probabilities"] = scheduler.inclusion_probabilities
            self._write(record)
            if self._progress:
                self._progress.step(record)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far an evaluation is."""
        self._evaluated += 1
        if self._progress:
            self._progress.evaluate(self._evaluated, len(kwargs["eval_dataloader"]))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation has ended."""
        self._evaluated = 0

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _raise_peak(self, use: MemoryUse) -> None:
        self._now = use
        self.peak = MemoryUse(
            **{key: max(value, asdict(self.peak)[key]) for key, value in asdict(use).items()}
        )


class SwitchClock(TrainerCallback):
    """Times a training step from before the sampling callback switches layers for it."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, for what is done once."""
        self._started = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, for a step."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop, and count what was taken with the step that comes next."""
        self._before += time.perf_counter() - self._started

    def stop(self) -> float:
        """Seconds since the start, and of what was done before it."""
        taken, self._before = self._before + time.perf_counter() - self._started, 0.0
        return taken


def read_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """What a run has written up to a step. A last line that was cut short when the machine went down is left out.

    Args:
        path: Its ``metrics.jsonl``; nothing is read where there is none.
        last_step: The step from which it will continue; what comes after it is left out.

    Raises:
        ConfigError: If a line other than the last is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(
                    f"{path}, line {number}: must be JSON, but: {error}. Take the line out to resume the run."
                ) from error
            logger.warning("The last line of %s was cut short and is left out.", path)
    return [record for record in records if record["step"] <= last_step]


def peak_process_bytes() -> int:
    """Most bytes of memory that this process has held, as the operating system counts them."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Most bytes that tensors have held on the GPU; ``None`` without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
