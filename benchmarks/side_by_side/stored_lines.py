"""A line of a benchmark's ``results.jsonl``: what it must hold for a report to be made of it, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from layersample.environment import describe_processor
from layersample.errors import ConfigError, short

from .jobs import Stage

Line = dict[str, Any]
Kind = Literal["weights", "gradients", "optimizer_state", "activations"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer_state", "activations")


class _Part(BaseModel):
    """Measurements may grow, so unknown ones stay; JSON has the right types already, so nothing is converted."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Run(_Part):
    key: str
    method: str
    stage: Literal[Stage, "memory", "time"]
    seed: int = Field(ge=0, lt=2**32)
    learning_rate: FiniteFloat = Field(ge=0)
    fingerprint: str


class _Failed(_Run):
    error: str


class _Loss(_Part):
    steps: list[int] = Field(min_length=1)
    held_out: list[FiniteFloat]  # a run that diverged has an error in its place
    as_trained: FiniteFloat | None = None  # where what is saved isn't what trained

    @model_validator(mode="after")
    def _alike(self) -> _Loss:
        if len(self.steps) != len(self.held_out):
            raise ValueError(f"has {len(self.steps)} steps and {len(self.held_out)} losses")
        return self


class _OtherLoss(_Part):
    before: FiniteFloat
    after: FiniteFloat


class _Tensors(_Part):
    total: int = Field(ge=0)
    at_peak: dict[Kind, int] = Field(min_length=len(KINDS))


class _Peak(_Part):
    process: int = Field(ge=0)
    tensors: _Tensors | None


class _Seconds(_Part):
    cpu: dict[str, FiniteFloat]
    wall: dict[str, FiniteFloat]
    before_training: dict[str, FiniteFloat]
    first_step: dict[str, FiniteFloat] = Field(
        default_factory=dict
    )  # runs of before it was measured have none
    each: dict[str, list[FiniteFloat]] = Field(default_factory=dict)  # those of stage "whole" alone have them


class _Environment(_Part):
    python: str
    processor: str
    instructions: str | None = None  # runs of before they were noted have none
    threads: int = Field(ge=1)
    gpu: str | None
    versions: dict[str, str]
    git: str | None


class _Memory(_Run):
    options: dict[str, Any]
    bytes: int = Field(ge=0)
    budget_bytes: int = Field(ge=0)
    planned: bool


class _Time(_Run):
    steps: int = Field(ge=1)
    search_steps: int = Field(ge=1)
    step_seconds: FiniteFloat = Field(ge=0)
    before_seconds: FiniteFloat = Field(ge=0)
    budget_seconds: FiniteFloat = Field(ge=0)
    clock: Literal["cpu", "wall"]


class _Measured(_Run):
    training_loss: list[float] = Field(min_length=1)
    loss: _Loss | None
    right: FiniteFloat | None
    other_loss: _OtherLoss | None
    peak_bytes: _Peak
    seconds: _Seconds
    tokens_per_second: FiniteFloat
    layers: list[str] = Field(min_length=1)
    active: list[tuple[int, int, list[int]]]
    coverage: FiniteFloat = Field(ge=0, le=1)
    staleness: FiniteFloat
    inclusion_probabilities: list[FiniteFloat] | None
    summary: str
    parameters: int = Field(gt=0)
    trainable_parameters: FiniteFloat
    moving_parameters: FiniteFloat = 0  # runs of before they were counted had none
    environment: _Environment

    @model_validator(mode="after")
    def _whole(self) -> _Measured:
        if self.stage == "final" and self.other_loss is None:
            raise ValueError("is a final run without other_loss")
        if self.stage == "whole" and any(not self.seconds.each.get(kind) for kind in ("cpu", "wall")):
            raise ValueError("is a whole run without the seconds of each step")
        if self.stage in ("search", "runoff", "rung", "final") and self.loss is None:
            raise ValueError(f"is a {self.stage} run without a loss")
        indices = [index for _, _, active in self.active for index in active]
        if any(not 0 <= index < len(self.layers) for index in indices):
            raise ValueError(f"names a layer that none of its {len(self.layers)} layers is")
        chances = self.inclusion_probabilities
        if chances is not None and len(chances) != len(self.layers):
            raise ValueError(f"has {len(chances)} inclusion_probabilities and {len(self.layers)} layers")
        return self


_KINDS: dict[str, type[_Run]] = {"memory": _Memory, "time": _Time}


def check_line(content: Any, place: str) -> Line:
    """Check one line.

    Args:
        content: What JSON holds.
        place: The file and line, for messages.

    Raises:
        ConfigError: If something is missing, or of another type.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: must be one JSON object, but is a {type(content).__name__}.")
    try:
        # By JSON's rules: a pair of numbers is a list there, and a whole number is a number.
        kind = _Failed if "error" in content else _KINDS.get(str(content.get("stage")), _Measured)
        kind.model_validate(_tuples(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{place}: must be what a run has measured, but {key}: {message}, and it is {short(first['input'])}."
        ) from error
    return content


def last_loss(line: Mapping[str, Any]) -> float:
    """The held-out loss at the end of a run, in nats a token."""
    return float(line["loss"]["held_out"][-1])


def clock_of(lines: Iterable[Line]) -> str:
    """Which seconds count: ``"cpu"``, or ``"wall"`` where a GPU works."""
    return "wall" if any(line["environment"].get("gpu") for line in lines) else "cpu"


def has_steps(line: Line, steps: int) -> bool:
    """Whether a run has so many steps; one that failed may be of any number."""
    return "training_loss" not in line or len(line["training_loss"]) == steps


def machine_of(line: Line) -> str:
    """The machine of a run, and its threads, in words."""
    return machine_in_words(line["environment"])


def machine_in_words(its: Mapping[str, Any]) -> str:
    """A machine as a run's ``environment`` describes it, and the run's threads.

    Its instructions belong to it: virtual machines call processors of several generations by one name.
    """
    count = its["threads"]
    threads = f"{count} thread" if count == 1 else f"{count} threads"
    return ", ".join(filter(None, (describe_processor(its), its["gpu"], threads)))


def step_seconds(line: Line, clock: str, phase: str | None = None) -> float:
    """Seconds of a run's step, the mean over its steps.

    Args:
        line: The run.
        clock: ``"cpu"`` or ``"wall"``.
        phase: A part of the step; all of it by default.
    """
    return float(sum(value for key, value in line["seconds"][clock].items() if phase in (None, key)))


def once_seconds(line: Line, clock: str) -> float:
    """Seconds that a run takes once: what its sampler measures first, and what its first step does besides."""
    seconds = line["seconds"]
    return float(seconds["before_training"][clock] + seconds.get("first_step", {}).get(clock, 0.0))


def run_seconds(line: Line, clock: str, steps: int | None = None) -> float:
    """Seconds that a run's training took, or would take.

    Args:
        line: The run.
        clock: ``"cpu"`` or ``"wall"``.
        steps: How many steps, as many as it had by default. The first of a whole run are known one by one, and any
            other takes the mean.
    """
    steps = len(line["training_loss"]) if steps is None else steps
    each = line["seconds"].get("each", {}).get(clock, [])
    return seconds_of(steps, once_seconds(line, clock), step_seconds(line, clock), each)


def seconds_of(steps: int, once: float, step: float, each: Sequence[float]) -> float:
    """Seconds of so many steps and of what is done once: of each step as far as it is known, then of the mean one."""
    known = each[:steps]
    return once + sum(known) + step * (steps - len(known))


def _tuples(content: Line) -> Line:
    spans = content.get("active")
    if isinstance(spans, list):
        return {**content, "active": [tuple(span) if isinstance(span, list) else span for span in spans]}
    return content
