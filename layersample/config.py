"""Every option of a run: its default, unit and bounds, behind the command line, YAML files and Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, model_validator

from layersample.errors import ConfigError, unknown
from layersample.layers.rules import Rule
from layersample.optim.frozen_state import StatePolicyName
from layersample.optim.step_in_backward import ClipBy, StepInBackward
from layersample.option_files import Options, make_options, read_yaml
from layersample.plugins import settings_files

if TYPE_CHECKING:  # seconds to import, and the command line reads this file first
    from transformers import PretrainedConfig

BUILTIN_MODEL = "smollm2-135m"
BUILTIN_DATA = "gsm_symbolic"
_MOST = 10**9  # of whatever is counted: a product of two such counts is still a size that torch takes


class SamplingOptions(Options):
    """Which layers train, and when."""

    sampler: str = Field("lisa", description="Name of the sampler; `layersample list` shows them.")
    sampler_options: dict[str, Any] = Field(
        {}, description="Options of the sampler: `layersample list NAME`."
    )
    num_active: int = Field(2, ge=1, le=_MOST, description="Layers that train at a time (γ).")
    budget: str | None = Field(
        None,
        coerce_numbers_to_str=True,  # YAML reads 0.05 as a number
        description="In place of num_active: what training may hold beyond the weights (2GiB), or the part of the "
        "parameters that may train at a time (0.05).",
    )
    period: int = Field(5, ge=1, le=_MOST, description="Optimizer steps between draws (K).")
    layers: str | None = Field(None, description="Path of the ModuleList of layers, if it can't be found.")
    embeddings: Rule = Field("train", description="Embeddings: train always, freeze, or sample as a layer.")
    head: Rule = Field("train", description="Output head: train, freeze or sample.")
    norm: Rule = Field("train", description="Final norm: train, freeze or sample.")
    other: Rule = Field("train", description="Parameters outside of these and the layers.")
    state: StatePolicyName = Field("drop", description="Optimizer state of frozen layers.")
    check: bool = Field(False, description="Check each period, bit by bit, that frozen weights don't move.")
    plugin: Path | None = Field(None, description="Python file that registers samplers of your own.")


class ProjectionOptions(Options):
    """Low-rank projection of the gradients."""

    projection: str | None = Field(
        None, description="Name of the projection; `layersample list` shows them. Default: full rank."
    )
    rank: int | None = Field(
        None, ge=1, le=_MOST, description="Rank of the projection; default: the projection's own."
    )
    projection_options: dict[str, Any] = Field(
        {}, description="Options of the projection: `layersample list NAME`."
    )

    @property
    def projection_arguments(self) -> dict[str, Any]:
        """The projection's options with its rank."""
        return self.projection_options | ({} if self.rank is None else {"rank": self.rank})


class ModelOptions(Options):
    """The model."""

    model: str = Field(BUILTIN_MODEL, description="Built-in name, local folder or hub id.")
    precision: Literal["fp32", "bf16", "bf16-mixed", "fp16-mixed"] = Field(
        "fp32",
        description="Type of weights and arithmetic; mixed: fp32 weights, and arithmetic in the other.",
    )
    master_weights: bool = Field(
        True, description="Train bf16 weights on fp32 masters, so that no update is lost in rounding."
    )
    save_precision: Literal["model", "fp32"] = Field(
        "model", description="Type of the saved weights: the model's own, or exact fp32."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    recompute: bool = Field(
        True, description="Compute cheap activations again in backward: the same to the bit, in less memory."
    )
    loss_chunk: int = Field(
        128,
        ge=0,
        le=_MOST,
        description="Positions whose logits exist at a time; 0: TRL's loss, which holds more.",
    )


class DataOptions(Options):
    """The data."""

    data: str = Field(
        BUILTIN_DATA,
        description="Built-in name; JSONL, CSV or Parquet file in TRL's prompt-completion or conversational "
        "format; or hub id.",
    )
    eval_data: str | None = Field(None, description="Held-out data; default: a part of the data.")
    eval_size: int = Field(32, ge=1, le=_MOST, description="Held-out problems, at most.")
    max_length: int = Field(
        256, ge=8, le=_MOST, description="Tokens of an example, at most; longer ones are cut."
    )


class OptimizationOptions(Options):
    """How it trains."""

    steps: int = Field(40, ge=1, le=_MOST, description="Optimizer steps.")
    epochs: float | None = Field(None, gt=0, le=1e6, description="Passes over the data, in place of steps.")
    batch_size: int = Field(4, ge=1, le=1_000_000, description="Examples of a forward pass, on each device.")
    gradient_accumulation: int = Field(
        1, ge=1, le=1_000_000, description="Forward passes of an optimizer step."
    )
    learning_rate: float = Field(3e-4, ge=0, le=1e3, description="Peak learning rate.")
    schedule: str = Field("linear", description="Learning-rate schedule, as transformers names it.")
    warmup: float = Field(0.0, ge=0, le=_MOST, description="Warm-up: steps, or a part of all steps below 1.")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="Weight decay.")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 doesn't clip.")
    clip_by: Literal["all", "running", "parameter"] = Field(
        "all",
        description="Norm to clip by: of all gradients; with step_in_backward: that of the step before (running), or "
        "each parameter's own.",
    )
    step_in_backward: bool = Field(
        False, description="Update each parameter in the backward pass, as soon as its gradient is whole."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of data order, dropout and draws.")


class OutputOptions(Options):
    """What is written, and where."""

    output: Path | None = Field(None, description="Folder of the run; default: a new one in runs/.")
    save_steps: int | None = Field(
        None, ge=1, le=_MOST, description="Optimizer steps between checkpoints; default: none."
    )
    resume: bool = Field(False, description="Continue the run in the output folder.")
    allow_changes: bool = Field(False, description="Resume though other options have changed.")
    overwrite: bool = Field(False, description="Replace the run in the output folder.")
    verify: bool = Field(
        True,
        description="Compare checksums of the checkpoint to resume from; sizes are compared in any case.",
    )


class TrainConfig(
    SamplingOptions, ProjectionOptions, ModelOptions, DataOptions, OptimizationOptions, OutputOptions
):
    """All options of ``layersample train``."""

    trainer: dict[str, Any] = Field({}, description="Whatever else TRL's SFTConfig takes.")

    @property
    def backward_stepping(self) -> StepInBackward | None:
        """How to step in the backward pass, if so."""
        if not self.step_in_backward:
            return None
        by: ClipBy = "parameter" if self.clip_by == "parameter" else "running"
        return StepInBackward(accumulation=self.gradient_accumulation, max_norm=self.clip or None, clip_by=by)

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
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


# What may differ when a run is resumed, because its result doesn't depend on it.
_MAY_CHANGE = {
    "output",
    "resume",
    "overwrite",
    "allow_changes",
    "save_steps",
    "save_precision",
    "check",
    "verify",
}


def check_same_run(config: TrainConfig, stored: Path) -> None:
    """Make sure that a run is resumed with the options that it was begun with.

    Args:
        config: The options now.
        stored: The run's ``config.yaml``; nothing is checked where there is none.

    Raises:
        ConfigError: If others have changed, and ``allow_changes`` is off; it gives both values of each.
    """
    if config.allow_changes or not stored.is_file():
        return
    before, now = read_yaml(stored), yaml.safe_load(write_yaml(config))
    changed = [
        f"{key} was {before[key]!r}, but is {now[key]!r} now"
        for key in sorted(before.keys() & now.keys() - _MAY_CHANGE)
        if before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"A run must be resumed with the options it was begun with: {'; '.join(changed)}. Leave them as they "
            "were, or add --allow-changes: its result will then be that of neither."
        )


def check_length(config: TrainConfig, model: PretrainedConfig) -> None:
    """Make sure that examples aren't longer than a model reads.

    Args:
        config: The options.
        model: The model's configuration; without ``max_position_embeddings`` it has no limit.

    Raises:
        ConfigError: If ``max_length`` is above it.
    """
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise ConfigError(
            f"max_length must be at most the model's {positions} positions, but got {config.max_length}."
        )


SECTIONS: tuple[type[Options], ...] = (
    SamplingOptions,
    ProjectionOptions,
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    OutputOptions,
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
    """The configuration as YAML that ``--config`` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
