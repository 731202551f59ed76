"""LoRA norms of each layer, LISA's measure of importance: from an adapter folder or a live PeftModel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layersample.errors import ConfigError
from layersample.layers.find import ModelLayers, find_layers
from layersample.metrics.adapter_files import LowRankUpdate, read_adapter_folder, read_live_adapter
from layersample.unwrapping import exact_values, unwrap


@dataclass(frozen=True)
class LoraNorms:
    """Frobenius norms of a layer over the modules that an adapter changes; all 0 where it changes none.

    Args:
        delta: ‖s·B·A‖_F, the size of the change.
        base: ‖W‖_F of the same modules.
        ratio: ``delta / base``.
        merged: ‖W + s·B·A‖_F.
    """

    delta: float
    base: float
    ratio: float
    merged: float


def lora_norms(
    adapter: str | Path | nn.Module,
    model: nn.Module | None = None,
    layers: ModelLayers | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[str, LoraNorms]:
    """Measure what a LoRA adapter changes in each layer of its model.

    LISA's importance is p(l) = w̃(l) / w(l): the mean norm of layer l's weights over a LoRA run, by that over
    a full fine-tuning run. ``merged`` is w̃ at the end of the LoRA run (T = 1 in the mean); w needs a full
    fine-tuning run, that an adapter knows nothing of, and ``base``, the norm that both runs start from,
    stands in for it. So the paper's w̃/w corresponds to ``merged / base``, that lies within 1 ± ``ratio``;
    as weights move little it hardly differs between layers, and ``ratio`` shows what does.

    No product B·A is ever formed: ‖s·B·A‖_F² = s²·Σ (BᵀB)∘(AAᵀ), of r × r matrices, in float64.

    Args:
        adapter: Folder of an adapter that PEFT saved, or a live PeftModel.
        model: The model that a folder's adapter was trained on, wrapped by PEFT or not; not needed with a
            PeftModel.
        layers: The model's layers; found by default.
        adapter_name: Which adapter of a live PeftModel; by default the active one.

    Returns:
        The norms of each layer in order, then of the groups (``"embeddings"``, ``"head"`` …) that the
        adapter changes.

    Raises:
        ConfigError: If a file is missing or corrupt, the adapter isn't a plain LoRA, is merged, or was
            trained on another model: its paths or shapes are named.

    References:
        LISA, arXiv 2403.17919; LoRA, arXiv 2106.09685.
    """
    if isinstance(adapter, nn.Module):
        model = adapter if model is None else model
        updates = read_live_adapter(model, adapter_name)
    elif model is None:
        raise ConfigError("model must be the model that the adapter folder belongs to, but got model=None.")
    else:
        updates = read_adapter_folder(adapter)
    model = unwrap(model)
    layers = find_layers(model) if layers is None else layers
    modules = _locate(model, updates)
    owner = _owners(model, layers)
    squares: dict[str, list[float]] = {layer.name: [0.0, 0.0, 0.0] for layer in layers.layers}
    for update, module in zip(updates, modules, strict=True):
        layer = owner.get(id(module.weight))
        if layer is not None:  # a frozen tower belongs to no layer
            found = _squared_norms(update, _oriented(module))
            squares[layer] = [
                total + new for total, new in zip(squares.get(layer, [0.0] * 3), found, strict=True)
            ]
    if not any(base for _, base, _ in squares.values()):
        raise ConfigError(
            f"The adapter must change at least one layer, but none of {_some(updates)} lies in one."
        )
    return {layer: _combine(*values) for layer, values in squares.items()}


def _locate(model: nn.Module, updates: Sequence[LowRankUpdate]) -> list[Any]:
    """The module that each update belongs to.

    Raises:
        ConfigError: If one isn't in the model, or its weight has another shape.
    """
    modules = dict(model.named_modules())
    missing = [u for u in updates if _find(modules, u.path) is None]
    if missing:
        raise ConfigError(
            f"The adapter must belong to the model, but {len(missing)} of its {len(updates)} modules aren't "
            f"in {type(model).__name__}: {_some(missing)}."
        )
    found = [_find(modules, update.path) for update in updates]
    for update, module in zip(updates, found, strict=True):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
            kind = weight.dtype if isinstance(weight, Tensor) else type(module).__name__
            raise ConfigError(
                f"{update.path} must have a floating-point weight to compare with, but has {kind}."
            )
        shape = tuple(_oriented(module).shape)
        needed = (update.b.shape[0], update.a[0].numel())
        if shape != needed:
            raise ConfigError(
                f"The adapter must belong to the model, but at {update.path} its B·A has shape {needed} and "
                f"the model's weight {shape}."
            )
    return found


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module at a path, inside of PEFT's wrappers or not."""
    module = modules.get(path, modules.get(f"base_model.model.{path}"))
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _oriented(module: Any) -> Tensor:
    """A module's weight as B·A has it, ``(out, in)``; of a convolution flattened."""
    from transformers.pytorch_utils import Conv1D

    weight = exact_values(module.weight).detach()
    return weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight.flatten(1)


def _owners(model: nn.Module, layers: ModelLayers) -> dict[int, str]:
    """Name of the layer or group of each parameter, by the parameter's id: tied ones have several names."""
    parameters = dict(model.named_parameters())
    units = [*layers.layers, *layers.groups.values()]
    return {id(parameters[name]): unit.name for unit in units for name in unit.parameters}


def _squared_norms(update: LowRankUpdate, weight: Tensor) -> tuple[float, float, float]:
    """‖s·B·A‖², ‖W‖² and ‖W + s·B·A‖², in float64."""
    a = update.a.to(weight.device).flatten(1).double()  # (r, in)
    b = update.b.to(weight.device).flatten(1).double()  # (out, r)
    w = weight.double()  # (out, in)
    delta = update.scale**2 * float(((b.T @ b) * (a @ a.T)).sum())  # (r, r) each
    base = float(w.square().sum())
    inner = update.scale * float(((b.T @ w) * a).sum())  # ⟨W, s·B·A⟩, through (r, in)
    return max(delta, 0.0), base, max(base + 2.0 * inner + delta, 0.0)


def _combine(delta: float, base: float, merged: float) -> LoraNorms:
    if not all(map(math.isfinite, (delta, base, merged))):
        raise ConfigError(
            "The adapter's and the model's weights must be finite, but some are NaN or infinite."
        )
    ratio = math.sqrt(delta / base) if base else (math.inf if delta else 0.0)
    return LoraNorms(math.sqrt(delta), math.sqrt(base), ratio, math.sqrt(merged))


def _some(updates: Sequence[LowRankUpdate], limit: int = 3) -> str:
    """A few of the updates, by path and shapes."""
    listed = [f"{u.path!r} (B {tuple(u.b.shape)}, A {tuple(u.a.shape)})" for u in updates[:limit]]
    return ", ".join(listed) + (f" and {len(updates) - limit} more" if len(updates) > limit else "")
