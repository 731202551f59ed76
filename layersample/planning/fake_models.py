"""A model of a configuration on fake tensors, whose weights take no memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from layersample.errors import ConfigError, first_line
from layersample.planning.fake_values import FakeValues
from layersample.planning.model_kinds import ModelKind, find_kind


@contextmanager
def fake_model(
    shape: PretrainedConfig, precision: str, *, lora_rank: int | None = None, kind: ModelKind | None = None
) -> Iterator[nn.Module]:
    """The model of a configuration, with weights that take no memory; they end with the context.

    Args:
        shape: The configuration.
        precision: As of a run: weights are bfloat16 for ``"bf16"``, else float32.
        lora_rank: Rank of a LoRA on all linear layers, if any.
        kind: How the model is planned; found from the configuration by default.

    Raises:
        ConfigError: If the model is of a kind that isn't planned.
    """
    kind = kind or find_kind(shape)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model: nn.Module
    if lora_rank is not None:
        model = _lora_model(kind, shape, dtype, lora_rank)
    with FakeTensorMode(), FakeValues():
        if lora_rank is not None:
            _make_fake(model)
        else:
            # Some wait for the values that they draw, which fake tensors never show.
            with no_init_weights():
                model = _build(kind, shape, dtype)
            model.tie_weights()  # type: ignore[operator]  # a part of what was left out
        yield model.train()


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Keep warnings about the model back for a while: built ten times, it would say each of them ten times."""
    loggers = [logging.getLogger(name) for name in ("transformers", "layersample.layers")]
    before = [logger.level for logger in loggers]
    for logger in loggers if quiet else ():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _build(kind: ModelKind, shape: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    try:
        return kind.build(shape, dtype=dtype)
    except Exception as error:  # a model's own code, which says in its own way what it doesn't like
        raise ConfigError(
            f"A model must be built of its configuration ({shape.model_type}), but that ends with "
            f"{first_line(error)}"
        ) from error


def add_lora(model: nn.Module, rank: int, *, on_no_device: bool = False) -> nn.Module:
    """A model with LoRA on all linear layers, as it is planned; without values where asked."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, lora, low_cpu_mem_usage=on_no_device)
    return adapted


def _lora_model(kind: ModelKind, shape: PretrainedConfig, dtype: torch.dtype, rank: int) -> nn.Module:
    """The model with LoRA, on no device: PEFT can't move fake tensors."""
    with torch.device("meta"):
        model = _build(kind, shape, dtype)
    adapted = add_lora(model, rank, on_no_device=True)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # PEFT would make 16-bit adapters float32 once they have a device
            parent, _, own = name.rpartition(".")
            setattr(adapted.get_submodule(parent), own, nn.Parameter(parameter.float()))
    return adapted


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors in the place of those on no device; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                table[name] = made[id(tensor)]  # type: ignore[assignment]
