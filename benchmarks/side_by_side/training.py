"""One run of one method: trained, measured and scored in this process."""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from layersample.activations.save_memory import save_memory
from layersample.bf16_products import fast_products
from layersample.environment import environment
from layersample.errors import ConfigError, first_line
from layersample.layers.find import find_layers
from layersample.lengths import fit_length
from layersample.optim.memory_use import optimizer_tensors
from layersample.registry import load_plugin
from layersample.training.arguments import training_arguments
from layersample.training.data import load_data
from layersample.training.models import load_model
from layersample.training.trainer import CheckedTrainer

from ..methods.method import Prepared
from .clock import PhaseClock
from .jobs import Job
from .recorder import Recorder, TimedTrainer, peak_bytes, put_around
from .scoring import HeldOut, choice_tokens, mean_loss, score_held_out, share_right
from .steps import layers_over_time, times
from .suite import Suite
from .tasks import Task, get_task, split

Report = Callable[[dict[str, Any]], None]


def run_job(suite: Suite, job: Job, report: Report) -> dict[str, Any]:
    """Train a model by one method with one seed, and measure it.

    Args:
        suite: What is the same for all methods.
        job: What is this run's own.
        report: Told of each step.

    Returns:
        The measurements, of JSON types.

    Raises:
        ConfigError: If something can't be used.
        NonFiniteLossError: If the loss is no number.
    """
    if suite.plugin is not None:
        load_plugin(suite.plugin)
    config = suite.config(job)
    method = suite.entry(job.row).definition
    model, tokenizer = load_model(
        config.model, torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    if suite.attention is not None:
        model.set_attn_implementation(suite.attention)
    config, _ = fit_length(config, model.config)
    parameters = sum(p.numel() for p in model.parameters())
    layers = find_layers(model, config.layers).layers
    modules = [model.get_submodule(layer.name) for layer in layers]  # adapters are put inside of them
    with tempfile.TemporaryDirectory(prefix="layersample-") as scratch:
        arguments = training_arguments(config, Path(scratch))
        before = _other_loss(suite, model, arguments, tokenizer) if job.stage == "final" else None
        torch.manual_seed(job.seed)  # adapters begin at random
        prepared = method.prepare(model, config)
        if config.budget is not None and prepared.sampling is None:
            raise ConfigError(
                f"The option budget is for methods that sample layers, which {job.row!r} doesn't: give it to those "
                "rows."
            )
        trainer, recorder = _make_trainer(suite, job, prepared, arguments, tokenizer, modules)
        trainer.chunk_loss(config.chunk_positions or 0, strict=config.loss_chunk != "auto")
        # The callback does it, where there is one.
        save_memory(prepared.model, loss_chunk=None, recompute=config.recompute and prepared.sampling is None)
        recorder.on_step = report
        with fast_products(prepared.model, mixed=config.precision == "bf16-mixed"):
            scores = _train(suite, job, trainer, tokenizer, prepared.as_saved, before)
            if job.stage == "final" and suite.lm_eval:
                with (prepared.as_saved or nullcontext)():
                    scores |= _score_by_harness(suite, trainer, tokenizer, prepared.merged)
    return {
        "training_loss": [step["loss"] for step in recorder.steps],
        **scores,
        "peak_bytes": peak_bytes(recorder),
        **times(recorder, each=job.stage == "whole"),
        **layers_over_time(recorder, [layer.name for layer in layers]),
        "cpu_seconds": time.process_time(),
        "summary": method.summary,
        "parameters": parameters,
        "trainable_parameters": fmean([step["trainable_parameters"] for step in recorder.steps]),
        "moving_parameters": fmean([step["moving_parameters"] for step in recorder.steps]),
        "options": config.model_dump(mode="json", exclude_defaults=True, exclude={"output"}),
        "environment": {**environment(), "git": git_revision()},
    }


def _make_trainer(
    suite: Suite,
    job: Job,
    prepared: Prepared,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[nn.Module],
) -> tuple[TimedTrainer, Recorder]:
    clock, sampling = PhaseClock(), prepared.sampling
    recorder = Recorder(
        modules,
        prepared.optimizer_tensors or (lambda: optimizer_tensors(trainer.optimizer)),
        prepared.weight_tensors,
        lambda: sampling.scheduler if sampling is not None else None,
        clock,
        trace_every={"final": suite.trace_every, "peak": 1}.get(job.stage, 0),
    )
    data = _load_data(suite, job, arguments)
    trainer = TimedTrainer(
        clock=clock,
        problems=data.pop("problems"),
        model=prepared.model,
        args=arguments,
        train_dataset=data.pop("train"),
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=[recorder],
        optimizers=(prepared.optimizer, None),
    )
    recorder.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if sampling is not None:
        sampling.attach(trainer)
    put_around(trainer, sampling, clock)
    return trainer, recorder


def _load_data(suite: Suite, job: Job, arguments: TrainingArguments) -> dict[str, Any]:
    """The run's data by its use: to train on, held out, other text, and the problems to be answered."""
    parts = split(
        get_task(suite.task, suite.answer_marker),
        validation_size=suite.validation_size,
        test_size=suite.test_size,
        train_size=job.steps * arguments.train_batch_size * arguments.gradient_accumulation_steps,
        seed=job.seed,
    )
    return {
        "train": parts.train,
        "held_out": parts.test if job.stage == "final" else parts.validation,
        "other": _load_other(suite),
        "problems": suite.problems(parts),
    }


def _load_other(suite: Suite) -> Dataset:
    other = load_data(suite.other_text)
    return other.select(range(min(suite.other_size, len(other))))


def _other_loss(
    suite: Suite, model: nn.Module, arguments: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> float:
    """The loss on other text of the model as it is loaded: what 4 bits do to its weights is forgotten as well."""
    device, other = next(model.parameters()).device, _load_other(suite)
    trainer = CheckedTrainer(
        model=model,
        args=arguments,
        train_dataset=other,
        eval_dataset={"other": other},
        processing_class=tokenizer,
    )
    with fast_products(model, mixed=bool(arguments.bf16)):
        loss = mean_loss(trainer, "other")
    model.to(device)  # methods are given it where it was loaded
    return loss


def _train(
    suite: Suite,
    job: Job,
    trainer: TimedTrainer,
    tokenizer: PreTrainedTokenizerBase,
    as_saved: Callable[[], AbstractContextManager[None]] | None,
    other_before: float | None,
) -> dict[str, Any]:
    """Train, and score the model along the way and after; a search only at its end, a timing never.

    What is scored is what a user keeps; where it trains with other weights, the last loss is measured both ways.
    """
    if job.stage in ("peak", "timing", "whole"):
        trainer.train()
        return {"loss": None, "right": None, "other_loss": None}
    saved, final = as_saved or nullcontext, job.stage == "final"
    along = suite.evaluations if final else 0
    task = get_task(suite.task, suite.answer_marker)
    asked = final and task.has_answers and bool(trainer.problems)
    choices, apart = _choices_in_held_out(trainer, tokenizer, task) if asked else ([], [])
    scored: list[HeldOut] = []

    def held_out() -> float:
        with saved():
            scored.append(score_held_out(trainer, "held_out", choices))
        return scored[-1].loss

    as_trained = None if as_saved is None else partial(mean_loss, trainer, "held_out")
    curve = LossCurve(held_out, job.steps, max(along, 1), as_trained)
    trainer.add_callback(curve)
    if along:
        curve.measure(0)
    trainer.train()
    right = scored[-1].right if asked else None
    if asked and right is None:  # they aren't scored with the loss, or an answer there is none of the choices
        apart = trainer.problems
    with saved():
        if apart:
            share = share_right(trainer.model, tokenizer, task, apart, suite.answer_tokens)
            right = share if right is None else right + (share - right) * len(apart) / len(trainer.problems)
        after = mean_loss(trainer, "other") if final else None
    return {
        "loss": {
            "steps": [step for step, _ in curve.points],
            "held_out": [loss for _, loss in curve.points],
            "as_trained": curve.as_trained,
        },
        "right": right,
        "other_loss": {"before": other_before, "after": after} if final else None,
    }


def _choices_in_held_out(
    trainer: TimedTrainer, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens to choose from in the pass of the held-out loss, and the problems that aren't in it.

    There are none where it can't score them: all that is held out must be a problem, and all problems held out but
    for those that are too long to leave room for a choice.
    """
    if not task.choices:
        return [], []
    problems = trainer.problems
    arguments: Any = trainer.args
    evaluation: Any = trainer.eval_dataset
    room = arguments.max_length or math.inf
    too_long = [row for row in problems if len(tokenizer(row["prompt"])["input_ids"]) >= room]
    tokens = choice_tokens(tokenizer, task.choices)
    if not tokens or len(evaluation["held_out"]) + len(too_long) != len(problems):
        return [], []
    return tokens, too_long


def _score_by_harness(
    suite: Suite,
    trainer: TimedTrainer,
    tokenizer: PreTrainedTokenizerBase,
    merged: Callable[[], nn.Module] | None,
) -> dict[str, Any]:
    """What the harness scores, or why it couldn't: what has been trained and measured isn't lost for it."""
    from .harness import evaluate  # seconds of imports, and an extra

    try:
        trained = trainer.accelerator.unwrap_model(trainer.model) if merged is None else merged()
        return evaluate(trained, tokenizer, suite.lm_eval, suite.lm_eval_tasks, limit=suite.lm_eval_limit)
    except Exception as error:  # whatever a task's code does
        return {"lm_eval_error": str(error) if isinstance(error, ConfigError) else first_line(error)}


class LossCurve(TrainerCallback):
    """Measures the held-out loss at some steps.

    Args:
        measure_loss: Measures it.
        steps: Steps of the run.
        count: How often, after the first time; the last step is always among them.
        measure_as_trained: Measures it with the weights that it trains with, where those are others.
    """

    def __init__(
        self,
        measure_loss: Callable[[], float],
        steps: int,
        count: int,
        measure_as_trained: Callable[[], float] | None = None,
    ) -> None:
        self.as_trained: float | None = None
        self._steps, self._measure_as_trained = steps, measure_as_trained
        self.points: list[tuple[int, float]] = []
        self._measure_loss = measure_loss
        self._at = {round(steps * i / count) for i in range(1, count + 1)}

    def measure(self, step: int) -> None:
        """Measure it now."""
        self.points.append((step, self._measure_loss()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure it where it is due."""
        if state.global_step in self._at:
            self.measure(state.global_step)
        if state.global_step == self._steps and self._measure_as_trained is not None:
            self.as_trained = self._measure_as_trained()


@cache
def git_revision() -> str | None:
    """The commit of this code when it was asked for first; ``None`` where it isn't in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
