"""Every option of a run: its default, unit and bounds, behind the command line, YAML files and Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, model_validator

from layersample.activations.options import ActivationOptions, off
from layersample.choices import ClipBy, Precision
from layersample.errors import ConfigError, unknown
from layersample.option_files import Options, make_options
from layersample.options import MOST, Role, option
from layersample.plugins import settings_files
from layersample.scheduling.options import (
    ProjectionOptions,
    SamplingOptions,
    SchedulerOptions,
    UpdateOptions,
    default_period,
)

if TYPE_CHECKING:  # seconds to import, and the command line reads this file first
    from layersample.optim.step_in_backward import StepInBackward

BUILTIN_MODEL = "smollm2-135m"
BUILTIN_DATA = "gsm_symbolic"
_RUN = (Role.IDENTITY, Role.MEMORY)


class RunSampling(SamplingOptions):
    """Which layers train, and when."""

    budget: Annotated[str, BeforeValidator(lambda value: value if value is None else str(value))] | None = (
        option(
            None,
            "In place of num_active: what training may hold beyond the weights (2GiB), or the part of the "
            "parameters that may train at a time (0.05).",
            *_RUN,
        )
    )
    plugin: Path | None = option(None, "Python file that registers samplers of your own.", *_RUN, Role.SUITE)


class RunProjection(ProjectionOptions):
    """Low-rank projection of the gradients."""

    rank: int | None = option(
        None, "Rank of the projection; default: the projection's own.", *_RUN, ge=1, le=MOST
    )


class RunUpdates(UpdateOptions):
    """How weights are updated, and what becomes of optimizer state."""

    clip: Annotated[float | None, BeforeValidator(off)] = option(
        1.0, "Largest norm of the gradient; 0 doesn't clip.", *_RUN, ge=0
    )
    clip_by: Literal["all", ClipBy] = option(
        "all",
        "Norm to clip by: of all gradients; with step_in_backward: that of the step before (running), or "
        "each parameter's own.",
        *_RUN,
    )


class ModelOptions(ActivationOptions):
    """The model, and what a step of it holds."""

    model: str = option(
        BUILTIN_MODEL, "Built-in name, local folder or hub id.", Role.IDENTITY, Role.SHOWN, Role.SUITE
    )
    precision: Precision = option(
        "fp32",
        "Type of weights and arithmetic; mixed: fp32 weights, and arithmetic in the other.",
        *_RUN,
    )
    save_precision: Literal["model", "fp32"] = option(
        "model", "Type of the saved weights: the model's own, or exact fp32.", Role.SUITE
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.", *_RUN)


def _read_columns(value: Any) -> Any:
    """Read ``prompt=question,completion=answer``, as the command line gives it."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise ValueError("Input should be NAME=COLUMN,NAME=COLUMN")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


class DataOptions(Options):
    """The data."""

    data: str = option(
        BUILTIN_DATA,
        "Built-in name; JSONL, JSON, CSV, Parquet or text file, or .gz of one; several with commas; a folder; or hub "
        "id. Formats: chat, ShareGPT, prompt and completion, Alpaca, text2text, plain text.",
        Role.IDENTITY,
        Role.SHOWN,
        Role.SUITE,
    )
    columns: Annotated[dict[str, str], BeforeValidator(_read_columns)] = option(
        {}, "Columns under other names: prompt=question,completion=answer.", Role.IDENTITY, Role.SUITE
    )
    train_on: Literal["answers", "all"] = option(
        "answers",
        "What is learned: answers and completions, or all that the model reads.",
        Role.IDENTITY,
        Role.SUITE,
    )
    eval_data: str | None = option(
        None, "Held-out data; default: a part of the data.", Role.IDENTITY, Role.SUITE
    )
    stream: bool = option(
        False,
        "Read the data while it trains, for files larger than memory.",
        Role.IDENTITY,
        Role.SUITE,
    )
    eval_size: int = option(32, "Held-out problems, at most.", Role.IDENTITY, Role.SUITE, ge=1, le=MOST)
    max_length: int = option(
        256,
        "Tokens of an example, at most; longer ones are cut. No more than the model's positions by default.",
        *_RUN,
        Role.SUITE,
        ge=8,
        le=MOST,
    )


class OptimizationOptions(Options):
    """How it trains."""

    steps: int = option(40, "Optimizer steps.", Role.IDENTITY, Role.SHOWN, Role.SUITE, ge=1, le=MOST)
    epochs: float | None = option(
        None, "Passes over the data, in place of steps.", Role.IDENTITY, Role.SUITE, gt=0, le=1e6
    )
    batch_size: int = option(
        4,
        "Examples of a forward pass, on each device.",
        *_RUN,
        Role.SHOWN,
        Role.SUITE,
        ge=1,
        le=10**6,
    )
    gradient_accumulation: int = option(1, "Forward passes of an optimizer step.", *_RUN, ge=1, le=10**6)
    learning_rate: float = option(
        3e-4, "Peak learning rate.", Role.IDENTITY, Role.SHOWN, Role.SUITE, ge=0, le=1e3
    )
    schedule: str = option("linear", "Learning-rate schedule, as transformers names it.", Role.IDENTITY)
    warmup: float = option(
        0.0, "Warm-up: steps, or a part of all steps below 1.", Role.IDENTITY, ge=0, le=MOST
    )
    weight_decay: float = option(0.0, "Weight decay.", Role.IDENTITY, ge=0, le=1e3)


class RankOptions(Options):
    """Several GPUs."""

    shard: Literal["fsdp2"] | None = option(
        None,
        "How ranks share the model: each holds a part of it (fsdp2). Default: each holds all of it (DDP).",
        *_RUN,
        Role.SUITE,
    )
    sharded_checkpoints: bool = option(
        True,
        "With shard: each rank writes its part of a checkpoint; otherwise the first one writes it whole.",
    )


class OutputOptions(Options):
    """What is written, and where."""

    output: Path | None = option(None, "Folder of the run; default: a new one in runs/.", Role.SUITE)
    save_steps: int | None = option(
        None, "Optimizer steps between checkpoints; default: none.", Role.SUITE, ge=1, le=MOST
    )
    resume: bool = option(False, "Continue the run in the output folder.", Role.SUITE)
    overwrite: bool = option(False, "Replace the run in the output folder.", Role.SUITE)
    verify: bool = option(
        True,
        "Compare checksums of the checkpoint to resume from; sizes are compared in any case.",
        Role.SUITE,
    )
    push_to_hub: str | None = option(
        None, "Repository on the hub to upload the model to at the end, as me/my-model."
    )
    private: bool = option(False, "With push_to_hub: make a new repository private.")


# The panels of the command line's help; the fields of the scheduler stand among them, in front of the run's own.
SECTIONS: tuple[type[Options], ...] = (
    RunSampling,
    RunProjection,
    RunUpdates,
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    RankOptions,
    OutputOptions,
)


class TrainConfig(
    RunSampling,
    RunProjection,
    RunUpdates,
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    RankOptions,
    OutputOptions,
    SchedulerOptions,
):
    """All options of ``layersample train``."""

    trainer: dict[str, Any] | None = option(None, "Whatever else TRL's SFTConfig takes.", Role.IDENTITY)

    if TYPE_CHECKING:  # a file of options holds no objects, see _are_named
        sampler: str = ""
        layers: str | None = None
        projection: str | None = None
        step_in_backward: bool = False

    @property
    def projection_arguments(self) -> dict[str, Any]:
        """The projection's options with its rank."""
        return (self.projection_options or {}) | ({} if self.rank is None else {"rank": self.rank})

    @property
    def run_seed(self) -> int:
        """Seed of data order, dropout and draws."""
        return self.seed or 0

    @property
    def run_period(self) -> int:
        """Optimizer steps between draws, as the run's steps have it; with ``epochs`` they aren't known yet."""
        return self.period or default_period(None if self.epochs is not None else self.steps)

    @property
    def has_masters(self) -> bool:
        """Whether bf16 weights train on fp32 masters."""
        return self.precision == "bf16" and self.master_weights

    @property
    def backward_stepping(self) -> StepInBackward | None:
        """How to step in the backward pass, if so."""
        if not self.step_in_backward:
            return None
        from layersample.optim.step_in_backward import StepInBackward

        return StepInBackward(
            accumulation=self.gradient_accumulation,
            max_norm=self.clip or None,
            clip_by="parameter" if self.clip_by == "parameter" else "running",
        )

    @property
    def scheduler_options(self) -> SchedulerOptions:
        """The options of the scheduler that a run has."""
        own = {
            "projection_options": self.projection_arguments or None,
            "step_in_backward": self.backward_stepping or False,
        }
        return SchedulerOptions(**{**self.arguments(), **own})

    @model_validator(mode="after")
    def _are_named(self) -> TrainConfig:
        for name, kind in (
            ("sampler", str),
            ("layers", str),
            ("projection", str),
            ("step_in_backward", bool),
        ):
            value: object = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                what = "a name" if kind is str else "true or false"
                raise ValueError(f"{name} must be {what}, but got {name}={value!r}")
        return self

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if self.budget is not None and self.draw_budget is not None:
            raise ValueError(
                "budget chooses num_active once, and draw_budget bounds each draw in its place: give one of them"
            )
        if self.private and self.push_to_hub is None:
            raise ValueError(
                "private is of a repository on the hub: name it by push_to_hub, or leave private out"
            )
        self._check_shards()
        if self.stream and self.epochs is not None:
            raise ValueError("stream reads data whose end isn't known: give steps in place of epochs")
        if self.resume and self.overwrite:
            raise ValueError("resume continues a run and overwrite replaces it: choose one of them")
        if self.resume and self.output is None:
            raise ValueError("resume needs output, the folder of the run to continue")
        if self.step_in_backward and self.clip and self.clip_by == "all":
            raise ValueError(
                "step_in_backward never has all gradients at once, and so can't clip by their norm: choose clip_by "
                "running or parameter, or clip 0"
            )
        if self.clip_by != "all" and not self.step_in_backward:
            raise ValueError(
                f"clip_by {self.clip_by} is for step_in_backward: turn it on, or choose clip_by all"
            )
        if self.step_in_backward and self.precision == "fp16-mixed":
            raise ValueError(
                "step_in_backward can't look for overflows of fp16 before it steps: choose another precision"
            )
        return self

    def _check_shards(self) -> None:
        if self.shard is None:
            return
        if self.has_masters:
            raise ValueError(
                "shard keeps no fp32 masters of bf16 weights: choose precision bf16-mixed, whose fp32 weights are in "
                "shards, or turn master_weights off"
            )
        if self.frozen_weights is not None:
            raise ValueError(
                "frozen_weights needs whole weights on each GPU, and shard cuts them: leave out one of them"
            )
        if self.step_in_backward:
            raise ValueError(
                "step_in_backward needs gradients that are whole in the backward pass, and shard adds up those of all "
                "ranks later: leave out one of them"
            )


def make_config(*layers: tuple[str, Mapping[str, Any]]) -> TrainConfig:
    """Make a configuration from several sources.

    Args:
        layers: Pairs of a source's name ("run.yaml", "command line") and its options; a later one wins.

    Raises:
        ConfigError: If a key is unknown or a value has the wrong type or is out of bounds; it names the
            source and the key.
    """
    return make_options(TrainConfig, layers, "option")


def read_preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        ConfigError: If there is none of that name.
    """
    presets = settings_files("presets")
    if name not in presets:
        raise ConfigError(unknown("preset", name, presets))
    options: dict[str, Any] = yaml.safe_load(presets[name])
    return options


def write_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``--config`` reads; ``epochs`` stand in place of ``steps``."""
    options = config.model_dump(mode="json")
    if config.epochs is not None:
        del options["steps"]
    return yaml.safe_dump(options, sort_keys=False)
