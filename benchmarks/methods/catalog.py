"""Every method by name: baselines, samplers, and samplers with a projection."""

from __future__ import annotations

from typing import Any

from layersample.errors import ConfigError, unknown
from layersample.registry import PROJECTIONS, create_sampler, describe, list_samplers

from . import baselines as _baselines  # noqa: F401  its decorators fill the table
from . import method
from . import quantized as _quantized  # noqa: F401
from .method import Method, sample_layers

# A sampler with low-rank projection is written SAMPLER+PROJECTION.
_JOINT = "+"


def get_method(name: str) -> Method:
    """The method of a name: a baseline, a sampler, or SAMPLER+PROJECTION.

    Raises:
        ConfigError: If there is none; it lists them all and the closest one. If a baseline has a sampler's name.
    """
    baselines, samplers = list_baselines(), list_samplers()
    if name in baselines and name in samplers:
        raise ConfigError(
            f"A baseline must have a name that no sampler has, but {name!r} is both: rename it."
        )
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
    return Method(name, summary, sample_layers, options, samples=True)


def list_baselines() -> dict[str, Method]:
    """All baselines by name, sorted."""
    return dict(sorted(method.BASELINES.items()))


def default_methods() -> list[str]:
    """Every registered sampler, each with and without GaLore's projection, and every baseline that is installed.

    A sampler that needs an option (``prior`` its weights) isn't among them: a suite gives it a row of its own.
    """
    names = [name for name in list_samplers() if _needs_no_option(name)]
    baselines = [name for name, method in list_baselines().items() if method.is_installed]
    alone = [name for name in names if not list_samplers()[name].needs_projection]
    return [*alone, *(f"{name}{_JOINT}galore" for name in names), *baselines]


def _needs_no_option(sampler: str) -> bool:
    try:
        create_sampler(sampler)
    except ConfigError:
        return False
    return True
