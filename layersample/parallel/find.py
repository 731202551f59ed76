"""Which engine a model runs in, as its wrappers and its optimizer show."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.parallel.base import NO_DATA_PARALLEL, Engine
from layersample.unwrapping import unwrap


def find_engine(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> Engine:
    """The engine of a model, as its wrappers and its optimizer show.

    Args:
        model: The model, with its wrappers if it has any.
        optimizer: Its optimizer, or a wrapper of one, or several.

    Raises:
        ConfigError: If layers can't be switched under it: DeepSpeed, ``nn.DataParallel``, or options of
            DistributedDataParallel or FullyShardedDataParallel that forbid it.
    """
    for each in optimizer if isinstance(optimizer, Sequence) else (optimizer,):
        _refuse_deepspeed(model, each)
    inner = unwrap(model)
    if isinstance(inner, nn.DataParallel):
        raise ConfigError(NO_DATA_PARALLEL)
    wrapper = _find_ddp(model)
    if wrapper is not None:
        from layersample.parallel.ddp import DDPEngine  # it is an Engine itself

        return DDPEngine(wrapper, inner)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what isn't imported wraps nothing
    if fsdp is None:
        return Engine(inner)
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in inner.modules()):
        from layersample.parallel.fsdp import FSDP1Engine

        return FSDP1Engine(inner)
    if any(isinstance(module, fsdp.FSDPModule) for module in inner.modules()):
        from layersample.parallel.fsdp import FSDPEngine

        return FSDPEngine(inner)
    return Engine(inner)


def _find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def _refuse_deepspeed(model: nn.Module, optimizer: Optimizer) -> None:
    inner = type(getattr(optimizer, "optimizer", optimizer))  # DeepSpeed's own isn't one of torch's
    classes = [*type(model).__mro__, *type(optimizer).__mro__, *inner.__mro__]
    by_class = any(cls.__module__.partition(".")[0] == "deepspeed" for cls in classes)
    by_name = type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"  # accelerate's own
    if not (by_class or by_name or any(hasattr(p, "ds_id") for p in model.parameters())):
        return
    raise ConfigError(
        "Layers can't be switched under DeepSpeed: ZeRO copies the parameters that require a gradient into flat "
        "buffers of its own once, when it is made, so it would go on training the first set, or move frozen "
        "layers. Use FSDP2 in its place (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 for accelerate), "
        "which shards weights, gradients and optimizer state as ZeRO-3 does, or DistributedDataParallel."
    )
