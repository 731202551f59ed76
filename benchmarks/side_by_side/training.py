"""One run of one method: trained, measured and scored in this process."""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
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
from layersample.errors import ConfigError
from layersample.layers.find import find_layers
from layersample.lengths import fit_length
from layersample.optim.memory_use import optimizer_tensors
from layersample.registry import load_plugin
from layersample.training.arguments import training_arguments
from layersample.training.data import load_data
from layersample.training.models import load_model

from ..methods.method import Prepared
from .clock import PHASES, PhaseClock
from .jobs import Job
from .recorder import Recorder, TimedTrainer, peak_bytes, put_around
from .scoring import HeldOut, choice_tokens, mean_loss, score_held_out, share_right
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
    torch.manual_seed(job.seed)  # adapters begin at random
    prepared = method.prepare(model, config)
    if config.budget is not None and prepared.sampling is None:
        raise ConfigError(
            f"The option budget is for methods that sample layers, which {job.row!r} doesn't: give it to those rows."
        )
    with tempfile.TemporaryDirectory(prefix="layersample-") as scratch:
        arguments = training_arguments(config, Path(scratch))
        trainer, recorder = _make_trainer(suite, job, prepared, arguments, tokenizer, modules)
        trainer.chunk_loss(config.chunk_positions or 0, strict=config.loss_chunk != "auto")
        # The callback does it, where there is one.
        save_memory(prepared.model, loss_chunk=None, recompute=config.recompute and prepared.sampling is None)
        recorder.on_step = report
        with fast_products(prepared.model, mixed=config.precision == "bf16-mixed"):
            scores = _train(suite, job, trainer, tokenizer, prepared.as_saved)
            if job.stage == "final" and suite.lm_eval:
                with (prepared.as_saved or nullcontext)():
                    scores["lm_eval"] = _score_by_harness(suite, trainer, tokenizer)
    return {
        "training_loss": [step["loss"] for step in recorder.steps],
        **scores,
        "peak_bytes": peak_bytes(recorder),
        **_times(recorder, each=job.stage == "whole"),
        **_layers(recorder, [layer.name for layer in layers]),
        "cpu_seconds": time.process_time(),
        "summary": method.summary,
        "parameters": parameters,
        "trainable_parameters": _mean([step["trainable_parameters"] for step in recorder.steps]),
        "moving_parameters": _mean([step["moving_parameters"] for step in recorder.steps]),
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
    other = load_data(suite.other_text)
    return {
        "train": parts.train,
        "held_out": parts.test if job.stage == "final" else parts.validation,
        "other": other.select(range(min(suite.other_size, len(other)))),
        "problems": suite.problems(parts),
    }


def _train(
    suite: Suite,
    job: Job,
    trainer: TimedTrainer,
    tokenizer: PreTrainedTokenizerBase,
    as_saved: Callable[[], AbstractContextManager[None]] | None,
) -> dict[str, Any]:
    """Train, and score the model before, along the way and after; a search only at its end, a timing never.

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
    with saved():
        before = mean_loss(trainer, "other") if final else None
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
        "other_loss": {"before": before, "after": after} if final else None,
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
    suite: Suite, trainer: TimedTrainer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    from .harness import evaluate  # seconds of imports, and an extra

    trained = trainer.accelerator.unwrap_model(trainer.model)
    return evaluate(trained, tokenizer, suite.lm_eval, suite.lm_eval_tasks, limit=suite.lm_eval_limit)


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


def _times(recorder: Recorder, *, each: bool) -> dict[str, Any]:
    """Means over the quiet steps, and, if asked for, those of each step: a mean in place of one that isn't quiet."""
    quiet = recorder.quiet
    seconds = {
        kind: {phase: _mean([s["seconds"].get(phase, {}).get(kind, 0.0) for s in quiet]) for phase in PHASES}
        for kind in ("cpu", "wall")
    }
    wall = sum(seconds["wall"].values())
    return {
        "seconds": {
            **seconds,
            "before_training": dict(recorder.preparation),
            "first_step": _beyond_others(recorder.steps[0], seconds),
            **({"each": _each(recorder, seconds)} if each else {}),
        },
        "tokens_per_second": _mean([step["tokens"] for step in quiet]) / wall,
    }


def _each(recorder: Recorder, means: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    quiet = {step["step"] for step in recorder.quiet}
    return {
        kind: [
            sum(spent[kind] for spent in step["seconds"].values())
            if step["step"] in quiet
            else sum(of.values())
            for step in recorder.steps
        ]
        for kind, of in means.items()
    }


def _beyond_others(first: Mapping[str, Any], means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds by which the first step's sampling and optimizer exceed those of the others.

    A basis that is kept for many steps is computed there, so a pace without it would be too good. Forward and backward
    do nothing once but to set kernels up.

    Args:
        first: The step.
        means: Of the other steps, by kind (``"cpu"``, ``"wall"``) and phase.
    """
    if "traced" in first:
        return dict.fromkeys(means, 0.0)
    parts, spent = ("sampling", "optimizer"), first["seconds"]
    return {
        kind: max(0.0, sum(spent.get(part, {}).get(kind, 0.0) - of[part] for part in parts))
        for kind, of in means.items()
    }


def _layers(recorder: Recorder, names: list[str]) -> dict[str, Any]:
    """What trained when, how many layers did, and for how many steps each hasn't at the end."""
    steps = recorder.steps
    last = {index: step["step"] for step in steps for index in step["active"]}
    chances = [step["inclusion"] for step in steps]
    known = len(chances) if all(c is not None and len(c) == len(names) for c in chances) else 0
    spans = []
    for active, group in groupby(steps, key=lambda step: step["active"]):
        members = list(group)
        spans.append([members[0]["step"], members[-1]["step"], active])
    return {
        "layers": names,
        "active": spans,  # first step, last step, indices of the layers that trained
        "coverage": len(last) / len(names),
        "staleness": _mean([len(steps) - last.get(index, 0) for index in range(len(names))]),
        "inclusion_probabilities": [_mean(column) for column in zip(*chances, strict=True)]
        if known
        else None,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
