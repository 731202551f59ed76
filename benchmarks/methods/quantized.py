"""QLoRA as its users run it: a base model in 4 bits (bitsandbytes), and adapters that train beside it (PEFT)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layersample.config import TrainConfig
from layersample.layers.find import find_layers

from .adapters import with_adapters
from .method import Prepared, register_baseline


@register_baseline("qlora", rate_scale=5.0, extra=("bitsandbytes", "quantized"))
def qlora(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train rank-16 adapters beside linear layers in 4 bits (QLoRA: PEFT, bitsandbytes NF4 with double quantization).

    What is saved is the adapters. They are scored on the base model as it was found, which they are merged into or
    loaded on; and as they were trained.

    References:
        arXiv 2305.14314.
    """
    return _prepare(model, config)


@register_baseline("qlora-4bit", rate_scale=5.0, extra=("bitsandbytes", "quantized"))
def qlora_4bit(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train as ``qlora`` does, and keep the base in 4 bits: it is what the adapters are scored on, as in the paper.

    References:
        arXiv 2305.14314.
    """
    return _prepare(model, config, keep_rounded=True)


def _prepare(model: nn.Module, config: TrainConfig, *, keep_rounded: bool = False) -> Prepared:
    """Adapters beside layers in 4 bits, whose exact weights can come back to be scored."""
    from peft import prepare_model_for_kbit_training

    dtype, exact = next(model.parameters()).dtype, _quantize(model, config)
    quantizable: Any = model
    quantizable.is_loaded_in_4bit = True  # as transformers marks one that it has quantized while loading
    # The Trainer switches checkpointing on, as for every other method.
    prepare: Any = prepare_model_for_kbit_training  # it has no types
    adapted = with_adapters(prepare(model, use_gradient_checkpointing=False), config)

    @contextmanager
    def as_saved() -> Iterator[None]:
        layers: dict[str, Any] = {name: adapted.get_submodule(f"base_model.model.{name}") for name in exact}
        held = {name: layer.base_layer for name, layer in layers.items()}
        for name, layer in layers.items():
            # Norms and the inputs that they make are in fp32 by now.
            layer.base_layer = copy.deepcopy(exact[name]).float().to(held[name].weight.device)
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.base_layer = held[name]

    def scales() -> Iterator[Tensor]:
        for module in adapted.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            while state is not None:  # the scales have scales of their own
                yield from (state.absmax, state.code)
                state = state.state2

    return Prepared(
        adapted,
        weight_tensors=scales,
        as_saved=None if keep_rounded else as_saved,
        merged=partial(_merge, adapted, {} if keep_rounded else exact, dtype),
    )


def _merge(adapted: Any, exact: Mapping[str, nn.Linear], dtype: torch.dtype) -> Any:
    """A plain model of adapters and the weights that they are beside: the exact ones where they are given.

    PEFT would merge into four bits, and round once more.
    """
    from bitsandbytes.functional import dequantize_4bit

    base = adapted.get_base_model()
    state = {
        name: own
        for name, own in base.state_dict().items()
        if "base_layer" not in name and "lora_" not in name
    }
    for name, layer in base.named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        beside = exact.get(name, layer.base_layer)
        packed = getattr(beside.weight, "quant_state", None)
        weight = beside.weight if packed is None else dequantize_4bit(beside.weight.data, packed)
        delta = layer.get_delta_weight("default").float()
        # The exact ones are none of the model's modules, so they stayed where it was loaded.
        state[f"{name}.weight"] = (weight.to(delta.device).float() + delta).to(dtype)
        if beside.bias is not None:
            state[f"{name}.bias"] = beside.bias
    plain: Any = type(base)(copy.deepcopy(base.config)).to(base.device, dtype)
    plain.load_state_dict(state)
    plain.generation_config = copy.deepcopy(base.generation_config)  # where an answer ends
    return plain


def _quantize(model: nn.Module, config: TrainConfig) -> dict[str, nn.Linear]:
    """Put layers of bitsandbytes in the place of the linear ones, as transformers does when it loads in 4 bits.

    Returns:
        What was there, by name.
    """
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]

    exact = {}
    for layer in find_layers(model, config.layers).layers:
        for own, module in list(model.get_submodule(layer.name).named_modules()):
            if type(module) is not nn.Linear:
                continue
            name, weight = f"{layer.name}.{own}", module.weight
            quantized = Linear4bit(  # type: ignore[no-untyped-call]
                *(module.in_features, module.out_features, module.bias is not None),
                compute_dtype=weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
            # Or an evaluation on some processors packs the codes anew, which not all sizes allow.
            quantized.support_avx512bf16_for_cpu = False
            quantized.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized.to(weight.device))
            exact[name] = module
    return exact
