"""What a method is: options of a run, and a function that prepares the model; samplers and baselines alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.config import TrainConfig
from layersample.errors import ConfigError, unknown
from layersample.registry import PROJECTIONS, create_sampler, describe, list_samplers

if TYPE_CHECKING:
    from layersample.integrations.transformers import LayerSamplingCallback

# A sampler with low-rank projection is written SAMPLER+PROJECTION.
_JOINT = "+"


@dataclass(frozen=True)
class Prepared:
    """What the Trainer is given.

    Args:
        model: The model, perhaps wrapped.
        optimizer: The optimizer; ``None`` for the Trainer's own AdamW, as the options say.
        sampling: Switches layers while the Trainer trains.
        optimizer_tensors: Gives all tensors that the optimizer holds besides the model's parameters; needed
            where ``optimizer.state`` doesn't name them all.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    sampling: LayerSamplingCallback | None = None
    optimizer_tensors: Callable[[], Iterable[Tensor]] | None = None


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
    """

    name: str
    summary: str
    prepare: Prepare
    options: Mapping[str, Any] = field(default_factory=dict)
    rate_scale: float = 1.0
    extra: tuple[str, str] | None = None

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


_baselines: dict[str, Method] = {}


def register_baseline(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    rate_scale: float = 1.0,
    extra: tuple[str, str] | None = None,
) -> Callable[[Prepare], Prepare]:
    """Decorator that makes a function a method of the benchmark; its docstring's first line says what it does.

    Args:
        name: Its name, different from every sampler's.
        options: Options of ``layersample train`` that it needs.
        rate_scale: What the default learning rates are multiplied by.
        extra: The module that it imports, and the extra of layersample that has it.

    Raises:
        ValueError: If another function has the name.
    """

    def decorate(prepare: Prepare) -> Prepare:
        other = _baselines.get(name)
        if other is not None and _place(other.prepare) != _place(prepare):
            raise ValueError(f"The baseline name {name!r} is taken by {'.'.join(_place(other.prepare))}.")
        summary = (prepare.__doc__ or "").strip().split("\n")[0]
        _baselines[name] = Method(name, summary, prepare, dict(options or {}), rate_scale, extra)
        return prepare

    return decorate


def sample_layers(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train a few layers at a time, as the configuration says."""
    # The Trainer takes seconds to import, which listing the methods need not spend.
    from layersample.finetune import scheduler_arguments
    from layersample.integrations.transformers import LayerSamplingCallback
    from layersample.planner import apply_budget

    config = apply_budget(config)
    return Prepared(model, sampling=LayerSamplingCallback(config.sampler, **scheduler_arguments(config)))


def get_method(name: str) -> Method:
    """The method of a name: a baseline, a sampler, or SAMPLER+PROJECTION.

    Raises:
        ConfigError: If there is none; it lists them all and the closest one.
    """
    baselines, samplers = list_baselines(), list_samplers()
    if name in baselines:
        return baselines[name]
    sampler, joint, projection = name.partition(_JOINT)
    if sampler not in samplers:
        raise ConfigError(unknown("method", name, [*samplers, *baselines]))
    options: dict[str, Any] = {"sampler": sampler}
    summary = describe(samplers[sampler])[0]
    if joint:
        PROJECTIONS.get(projection)
        options["projection"] = projection
        summary = f"{summary.rstrip('.')}; gradients projected to low rank ({projection})."
    return Method(name, summary, sample_layers, options)


def list_baselines() -> dict[str, Method]:
    """All baselines by name, sorted."""
    from . import baselines  # noqa: F401  its decorators fill the table

    return dict(sorted(_baselines.items()))


def default_methods() -> list[str]:
    """Every registered sampler, each with and without GaLore's projection, and every baseline that is installed.

    A sampler that needs an option (``prior`` its weights) isn't among them: a suite gives it a row of its own.
    """
    names = [name for name in list_samplers() if _needs_no_option(name)]
    baselines = [name for name, method in list_baselines().items() if method.is_installed]
    return [*names, *(f"{name}{_JOINT}galore" for name in names), *baselines]


def _needs_no_option(sampler: str) -> bool:
    try:
        create_sampler(sampler)
    except ConfigError:
        return False
    return True


def _place(function: Prepare) -> tuple[str, str]:
    return function.__module__, function.__qualname__
