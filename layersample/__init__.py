"""layersample: fine-tune large models a few layers at a time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layersample.checkpoints import Checkpoints
from layersample.costs import LayerCosts, layer_costs
from layersample.errors import ConfigError
from layersample.head import ChunkedLoss
from layersample.layers import Layer, ModelLayers, find_layers
from layersample.memory import MemoryUse, measure_memory
from layersample.projection import LowRankStep, Projection, ProjectionContext, Side
from layersample.recompute import SelectiveRecompute
from layersample.registry import (
    create_projection,
    create_sampler,
    list_projections,
    list_samplers,
    load_plugin,
    register,
    register_projection,
)
from layersample.sampler import (
    LayerSampler,
    LayerStatistics,
    Measurement,
    SamplingContext,
)
from layersample.scheduler import LayerScheduler
from layersample.step_in_backward import StepInBackward
from layersample.weighted import Cost, MeasuredSampler, WeightedSampler

if TYPE_CHECKING:
    from layersample import metrics
    from layersample.integrations.transformers import LayerSamplingCallback

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "ChunkedLoss",
    "ConfigError",
    "Cost",
    "Layer",
    "LayerCosts",
    "LayerSampler",
    "LayerSamplingCallback",
    "LayerScheduler",
    "LayerStatistics",
    "LowRankStep",
    "MeasuredSampler",
    "Measurement",
    "MemoryUse",
    "ModelLayers",
    "Projection",
    "ProjectionContext",
    "SamplingContext",
    "SelectiveRecompute",
    "Side",
    "StepInBackward",
    "WeightedSampler",
    "create_projection",
    "create_sampler",
    "find_layers",
    "layer_costs",
    "list_projections",
    "list_samplers",
    "load_plugin",
    "measure_memory",
    "metrics",
    "register",
    "register_projection",
]


def __getattr__(name: str) -> Any:
    # Importing the Trainer takes seconds that a plain torch loop need not spend; metrics are wanted by few.
    if name == "metrics":
        return import_module("layersample.metrics")
    if name == "LayerSamplingCallback":
        from layersample.integrations.transformers import LayerSamplingCallback

        return LayerSamplingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
