"""Models that come quantized by someone else: their matrices can't train, so norms alone would be sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError, some
from layersample.layers.find import ModelLayers
from layersample.unwrapping import is_dtensor, is_fake

_TRAINABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
# Names under which GPTQ, AWQ, HQQ and the like keep a matrix as whole numbers.
_CODES = ("qweight", "W_q", "weight_packed", "qzeros")


def refuse_quantized(model: nn.Module, layers: ModelLayers) -> None:
    """Make sure that the layers' matrices are numbers that can train. A model with adapters trains these.

    Args:
        model: The model.
        layers: Its layers.

    Raises:
        ConfigError: If matrices came in 8 or 4 bits: bitsandbytes, GPTQ, AWQ, fp8, HQQ, torchao.
    """
    if hasattr(model, "peft_config") or any("lora_" in name for name, _ in model.named_parameters()):
        return
    paths = tuple(layer.name + "." for layer in layers.layers)
    found = {
        name: what
        for name, module in model.named_modules()
        if (name + ".").startswith(paths) and (what := _quantized(module))
    }
    if found:
        kinds = ", ".join(sorted(set(found.values())))
        raise ConfigError(
            f"Layers must have matrices of floating-point numbers to train, but those of this model came quantized "
            f"({kinds}): {some(found, 3)}. Load the original model, and give LayerScheduler frozen_weights='nf4' or "
            f"'int8' for as little memory (load_frozen never has it whole on the device); or train adapters on it."
        )


def _quantized(module: nn.Module) -> str | None:
    for tensor in module._parameters.values():
        if (
            tensor is None
            or tensor.dim() < 2
            and type(tensor.data) is Tensor
            and type(tensor) is nn.Parameter
        ):
            continue
        plain = type(tensor.data) in (Tensor, nn.Parameter) or is_dtensor(tensor) or is_fake(tensor.data)
        if tensor.dtype not in _TRAINABLE:
            return f"{type(module).__name__}, {str(tensor.dtype).removeprefix('torch.')}"
        if not plain:
            return f"{type(module).__name__}, {type(tensor.data).__name__}"
    if any(name in module._buffers or name in module._parameters for name in _CODES):
        return type(module).__name__
    return None
