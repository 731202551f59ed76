"""What a method is: options of a run, and a function that prepares the model; samplers and baselines alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.config import TrainConfig
from layersample.errors import ConfigError

if TYPE_CHECKING:
    from layersample.integrations.transformers import LayerSamplingCallback


@dataclass(frozen=True)
class Prepared:
    """What the Trainer is given.

    Args:
        model: The model, perhaps wrapped.
        optimizer: The optimizer; ``None`` for the Trainer's own AdamW, as the options say.
        sampling: Switches layers while the Trainer trains.
        optimizer_tensors: Gives all tensors that the optimizer holds besides the model's parameters; needed
            where ``optimizer.state`` doesn't name them all.
        weight_tensors: Gives all tensors that hold weights besides the model's parameters and buffers.
        as_saved: Has the model compute with what a user keeps of it, where that isn't what it trains with: weights
            that are rounded while they train.
        merged: Gives the model that a user would save, for other programs to load; needed where that is neither the
            model nor what PEFT merges by itself.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    sampling: LayerSamplingCallback | None = None
    optimizer_tensors: Callable[[], Iterable[Tensor]] | None = None
    weight_tensors: Callable[[], Iterable[Tensor]] = tuple
    as_saved: Callable[[], AbstractContextManager[None]] | None = None
    merged: Callable[[], nn.Module] | None = None


Prepare = Callable[[nn.Module, TrainConfig], Prepared]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, as the benchmark runs it.

    Args:
        name: Its row in the table.
        summary: What it does, in a line.
        prepare: Prepares the model for it.
        options: Options of ``layersample train`` that it needs.
        rate_scale: What the default learning rates are multiplied by. Adapters start from zero and are
            trained at higher rates than weights.
        extra: The module that it imports, and the extra of layersample that has it.
        samples: Whether it is the model, with layers sampled as its options say, and nothing else.
        adapter_rank: Gives the rank of its adapters on all linear layers, where these are all that trains: with
            this, or by ``samples``, its memory can be planned.
    """

    name: str
    summary: str
    prepare: Prepare
    options: Mapping[str, Any] = field(default_factory=dict)
    rate_scale: float = 1.0
    extra: tuple[str, str] | None = None
    samples: bool = False
    adapter_rank: Callable[[TrainConfig], int] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return self.extra is None or find_spec(self.extra[0]) is not None

    def check_installed(self) -> None:
        """Make sure that its package is there.

        Raises:
            ConfigError: If it isn't; it says how to install it.
        """
        if self.extra is not None and not self.is_installed:
            module, extra = self.extra
            raise ConfigError(
                f"The method {self.name!r} needs the package {module}, which isn't installed: "
                f'pip install "layersample[{extra}]".'
            )


BASELINES: dict[str, Method] = {}


def register_baseline(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    rate_scale: float = 1.0,
    extra: tuple[str, str] | None = None,
    samples: bool = False,
    adapter_rank: Callable[[TrainConfig], int] | None = None,
) -> Callable[[Prepare], Prepare]:
    """Decorator that makes a function a method of the benchmark; its docstring's first line says what it does.

    Args:
        name: Its name, different from every sampler's.
        options: Options of ``layersample train`` that it needs.
        rate_scale: What the default learning rates are multiplied by.
        extra: The module that it imports, and the extra of layersample that has it.
        samples: Whether it samples layers as its options say, and does nothing else.
        adapter_rank: Gives the rank of its adapters, where these are all that trains.

    Raises:
        ValueError: If another function has the name.
    """

    def decorate(prepare: Prepare) -> Prepare:
        other = BASELINES.get(name)
        if other is not None and _place(other.prepare) != _place(prepare):
            raise ValueError(f"The baseline name {name!r} is taken by {'.'.join(_place(other.prepare))}.")
        summary = (prepare.__doc__ or "").strip().split("\n")[0]
        BASELINES[name] = Method(
            name, summary, prepare, dict(options or {}), rate_scale, extra, samples, adapter_rank
        )
        return prepare

    return decorate


def sample_layers(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train a few layers at a time, as the configuration says."""
    # The Trainer takes seconds to import, which listing the methods need not spend.
    from layersample.integrations.transformers import LayerSamplingCallback
    from layersample.planning.budget import apply_budget
    from layersample.training.arguments import callback_arguments

    config = apply_budget(config)
    sampling = LayerSamplingCallback(**callback_arguments(config))
    if config.frozen_weights is None:
        return Prepared(model, sampling=sampling)

    def codes() -> Iterable[Tensor]:
        frozen = None if sampling.scheduler is None else sampling.scheduler.frozen
        return () if frozen is None else frozen.tensors

    def as_saved() -> AbstractContextManager[None]:
        return nullcontext() if sampling.scheduler is None else sampling.scheduler.exact_weights()

    return Prepared(model, sampling=sampling, weight_tensors=codes, as_saved=as_saved)


def _place(function: Prepare) -> tuple[str, str]:
    return function.__module__, function.__qualname__
