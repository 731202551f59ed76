"""What is measured of each step of a run, whichever method it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layersample.optim.memory_use import count_bytes
from layersample.scheduling.scheduler import LayerScheduler
from layersample.training.recording import peak_device_bytes, peak_process_bytes
from layersample.training.trainer import CheckedTrainer

from .clock import PhaseClock
from .live_bytes import LiveBytes, PeakBytes
from .stored_lines import KINDS

Tensors = Callable[[], Iterable[Tensor]]


class TimedTrainer(CheckedTrainer):
    """The Trainer of ``layersample train``, with a clock on forward and backward and a count of tokens.

    Args:
        clock: The clock.
        problems: What the trained model is to answer.

    Attributes:
        tokens: Tokens of the step's batches, without padding.
    """

    def __init__(self, *, clock: PhaseClock, problems: list[dict[str, Any]], **kwargs: Any) -> None:
        self.clock = clock
        self.problems = problems
        self.tokens = 0
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Time the forward pass of training."""
        if model.training:
            self.tokens += int(inputs["attention_mask"].sum())
        # What an evaluation takes is forgotten at the next step's beginning.
        with self.clock.phase("forward" if model.training else "evaluation"):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Time both passes."""
        # Forward has a clock of its own, inside of this one.
        with self.clock.phase("forward_backward"):
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.accelerator.sync_gradients:  # the last batch of a step: clipping comes next
            self.clock.start("optimizer")
        return loss


class Recorder(TrainerCallback):
    """Keeps what each step measured; put it behind the callback that samples layers.

    Args:
        layers: The modules of the model's layers, from the input to the output.
        optimizer_tensors: Gives all tensors that the optimizer holds.
        weight_tensors: Gives all tensors that hold weights besides parameters and buffers.
        scheduler: Gives the layer scheduler, where there is one.
        clock: Times the parts of a step.
        trace_every: Steps between traces of all live tensors; 0: never. They slow a step down, so times
            are taken from the others.

    Attributes:
        steps: What was measured of each step that has ended.
        peaks: Peaks of all live tensors, in the traced steps.
        preparation: CPU and wall seconds of what the sampler measured before the first step.
        on_step: Told of each step that has ended.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        optimizer_tensors: Tensors,
        weight_tensors: Tensors,
        scheduler: Callable[[], LayerScheduler | None],
        clock: PhaseClock,
        *,
        trace_every: int,
    ) -> None:
        self.on_step: Callable[[dict[str, Any]], None] = lambda step: None
        self.steps: list[dict[str, Any]] = []
        self.peaks: list[PeakBytes] = []
        self.preparation: Mapping[str, float] = {}
        self.trainer: TimedTrainer | None = None
        self._layers = layers
        self._tensors, self._weights = optimizer_tensors, weight_tensors
        self._scheduler = scheduler
        self._clock = clock
        self._trace_every = trace_every
        self._live: LiveBytes | None = None
        self._record: dict[str, Any] = {}

    @property
    def quiet(self) -> list[dict[str, Any]]:
        """Steps whose time and memory are the method's own: not traced, nor the first, which sets kernels up."""
        return [step for step in self.steps[1:] if "traced" not in step] or self.steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the sampler's own measurements have cost."""
        self.preparation = self._clock.seconds.get("sampling", {"cpu": 0.0, "wall": 0.0})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step: the layers have been switched."""
        model, step = kwargs["model"], state.global_step + 1
        scheduler = self._scheduler()
        names = frozenset() if scheduler is None else scheduler.moving_parameters
        # They require a gradient too, but have no optimizer state, and their layers weren't drawn.
        moving = {p for name, p in model.named_parameters() if name in names}
        self._record = {
            "step": step,
            "active": [i for i, layer in enumerate(self._layers) if _trains(layer, moving)],
            "trainable_parameters": sum(
                p.numel() for p in model.parameters() if p.requires_grad and p not in moving
            ),
            "moving_parameters": sum(p.numel() for p in moving),
            "inclusion": scheduler.inclusion_probabilities if scheduler else None,
        }
        assert self.trainer is not None
        self.trainer.tokens = 0
        reset_peaks()
        # The last step as well: state that is kept has grown until then.
        if self._trace_every and (step % self._trace_every == 0 or step == state.max_steps):
            self._live = LiveBytes(model)
            self._live.mark("weights", self._weights())
            self._live.start(self._tensors())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the gradients while they are all there."""
        grads = (p.grad for p in kwargs["model"].parameters())
        self._record["gradient_bytes"] = count_bytes(grad for grad in grads if grad is not None)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the optimizer's bytes when it has stepped."""
        self._record["optimizer_bytes"] = count_bytes(self._tensors())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a step: gradients are clipped, used and freed."""
        self._clock.stop("optimizer")
        if self._live is not None:
            self.peaks.append(self._live.stop(self._tensors()))
            self._live = None
            self._record["traced"] = True
        self._record |= {"process_bytes": peak_process_bytes(), "device_bytes": peak_device_bytes()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the step, with its loss."""
        if not logs or "loss" not in logs or not self._record:
            return
        assert self.trainer is not None
        seconds = self._clock.seconds
        both = seconds.pop("forward_backward")
        seconds["backward"] = {kind: both[kind] - seconds["forward"][kind] for kind in both}
        self._record |= {"loss": logs["loss"], "tokens": self.trainer.tokens, "seconds": seconds}
        self.steps.append(self._record)
        self.on_step(self._record)
        self._record = {}


class Mark(TrainerCallback):
    """Starts or stops the clock of sampling; one goes in front of the sampling callback and one behind it.

    Args:
        clock: The clock.
        first: Whether this is the one in front.
    """

    def __init__(self, clock: PhaseClock, *, first: bool) -> None:
        self._clock = clock
        self._first = first

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samplers measure the model before the first step."""
        self._mark()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Layers are switched at the beginning of a step."""
        self._mark()

    def _mark(self) -> None:
        if self._first:
            self._clock.begin_step()
            self._clock.start("sampling")
        else:
            self._clock.stop("sampling")


def put_around(trainer: Trainer, sampling: TrainerCallback | None, clock: PhaseClock) -> None:
    """Put the two marks around the sampling callback, or in front of all where there is none."""
    callbacks = trainer.callback_handler.callbacks
    place = callbacks.index(sampling) if sampling is not None else 0
    callbacks.insert(place + (sampling is not None), Mark(clock, first=False))
    callbacks.insert(place, Mark(clock, first=True))


def reset_peaks() -> None:
    """Count the most bytes of this process (on Linux) and of the GPU anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the whole process, loading included
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(recorder: Recorder) -> dict[str, Any]:
    """The peaks of a run: of the process, and of all live tensors by kind in the traced steps."""
    tensors = None
    if recorder.peaks:
        peak = max(recorder.peaks, key=lambda p: p.total)
        largest = {kind: max(p.largest[kind] for p in recorder.peaks) for kind in KINDS}
        tensors = {"total": peak.total, "at_peak": peak.at_peak, "largest": largest}
    on_device = [step["device_bytes"] for step in recorder.quiet]
    return {
        "process": max(step["process_bytes"] for step in recorder.quiet),
        "device": None if None in on_device else max(on_device),
        "gradients": max(step["gradient_bytes"] for step in recorder.steps),
        "optimizer_state": max(step["optimizer_bytes"] for step in recorder.steps),
        "tensors": tensors,
    }


def _trains(layer: nn.Module, moving: Collection[Tensor]) -> bool:
    return any(p.requires_grad and p not in moving for p in layer.parameters())
