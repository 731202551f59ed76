"""Models that come quantized by someone else: their matrices can't train, so norms alone would be sampled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError, some
from layersample.layers.find import ModelLayers
from layersample.notices import warn_once
from layersample.unwrapping import is_dtensor, is_fake

logger = logging.getLogger(__name__)

_TRAINABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
# Names under which GPTQ, AWQ, HQQ and the like keep a matrix as whole numbers.
_CODES = ("qweight", "W_q", "weight_packed", "qzeros")
_NO_CODES = (torch.bool, torch.int64)  # masks and positions: nobody keeps 4 or 8 bits in so many
_ONE_BYTE = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_LEAST = 64  # elements


def refuse_quantized(model: nn.Module, layers: ModelLayers) -> None:
    """Make sure that the layers' matrices are numbers that can train. A model with adapters trains these.

    Args:
        model: The model.
        layers: Its layers.

    Raises:
        ConfigError: If matrices came in 8 or 4 bits (bitsandbytes, GPTQ, AWQ, fp8, HQQ, torchao, BitNet), whether as
            parameters, as buffers or as a module's attributes.
    """
    if _has_adapters(model):
        return
    paths = tuple(layer.name + "." for layer in layers.layers)
    inside = {name: module for name, module in model.named_modules() if (name + ".").startswith(paths)}
    found = {name: what for name, module in inside.items() if (what := _quantized(module))}
    if found:
        kinds = ", ".join(sorted(set(found.values())))
        raise ConfigError(
            f"Layers must have matrices of floating-point numbers to train, but those of this model came quantized "
            f"({kinds}): {some(found, 3)}. Load the original model, and give LayerScheduler frozen_weights='nf4' or "
            f"'int8' for as little memory (load_frozen never has it whole on the device); or train adapters on it."
        )
    if not any(map(_has_matrix, inside.values())) and (held := [n for n, m in inside.items() if _holds(m)]):
        raise ConfigError(
            f"Layers must have their matrices as parameters to train, but in this model they are buffers or plain "
            f"attributes, and only vectors are parameters: {some(held, 3)}. Load the original model, or make them "
            f"parameters."
        )


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") or any("lora_" in name for name, _ in model.named_parameters())


def _can_be_reversed(operation: Any) -> bool:
    try:
        return operation.reverse_op is not None
    except NotImplementedError:
        return False


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
            return _kind(module, tensor)
        if not plain:
            return f"{type(module).__name__}, {type(tensor.data).__name__}"
    if any(name in module._buffers or name in module._parameters for name in _CODES):
        return type(module).__name__
    # Whole numbers beside their scales, and no matrix to train: BitNet, EETQ, and what is written by hand.
    beside = list(_beside(module))
    codes = next((tensor for tensor in beside if _are_codes(tensor)), None)
    own = [*beside, *(p for p in module._parameters.values() if p is not None)]
    scaled = any(tensor.dtype in _TRAINABLE for tensor in own)
    return _kind(module, codes) if codes is not None and scaled and not _has_matrix(module) else None


def _beside(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module that aren't parameters."""
    values = (*module._buffers.values(), *vars(module).values())
    return (value for value in values if isinstance(value, Tensor))


def _are_codes(tensor: Tensor) -> bool:
    if tensor.dtype in (*_TRAINABLE, *_NO_CODES) or tensor.numel() < _LEAST:
        return False
    return tensor.dim() > 1 or tensor.dtype in _ONE_BYTE


def _has_matrix(module: nn.Module) -> bool:
    # FullyShardedDataParallel shows a rank's part of a matrix as a vector.
    of_matrices = (p for p in module.parameters() if p.dim() > 1 or hasattr(p, "_fsdp_flattened"))
    return any(parameter.dtype in _TRAINABLE for parameter in of_matrices)


def _holds(module: nn.Module) -> bool:
    return any(t.dim() > 1 and t.numel() >= _LEAST and t.dtype != torch.bool for t in _beside(module))


def _kind(module: nn.Module, tensor: Tensor) -> str:
    return f"{type(module).__name__}, {str(tensor.dtype).removeprefix('torch.')}"


def save_plainly(model: nn.Module) -> None:
    """Have a model that transformers dequantized while it loaded it be saved as the plain one that it is.

    Its ``save_pretrained`` turns weights back into what they were in the file: fp8 ones are rounded anew, and MXFP4
    ones get names of codes that they aren't, so that nothing reads them. The file's configuration names no format
    then, and the model that is loaded from it is another one.

    Args:
        model: The model.

    Raises:
        ConfigError: If it still is quantized for transformers, which can't turn back what it made of the file, so
            that nothing of it could be saved; one with adapters saves these.
    """
    for module in model.modules():
        conversions: Any = vars(module).get("_weight_conversions")
        operations = [one for each in conversions or () for one in getattr(each, "operations", ())]
        of_quantizer = [one for one in operations if hasattr(one, "hf_quantizer")]
        if hasattr(module, "hf_quantizer"):
            if not _has_adapters(model) and not all(map(_can_be_reversed, of_quantizer)):
                raise ConfigError(
                    f"The model must be one that can be saved once it has trained, but it came quantized "
                    f"({type(module.hf_quantizer).__name__}), and transformers can't turn its weights back into those "
                    "of its files: load the original model."
                )
        elif of_quantizer:
            # Those of a model that never was quantized, as transformers does it for a GGUF file.
            module._weight_conversions = None  # type: ignore[assignment]
            warn_once(
                logger,
                model,
                "The model came quantized, and was turned into plain weights as it was loaded. They train, and are "
                "saved as they are: in %s.",
                str(next(module.parameters()).dtype).removeprefix("torch."),
            )
