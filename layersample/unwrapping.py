"""What is inside of wrappers: the model, the optimizer, this rank's part of a tensor, and a weight's exact values."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer

from layersample.notices import warn_once

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

FROZEN = "_layersample_frozen"
"""Attribute of a parameter that is held rounded: its layersample.frozen.matrix.FrozenMatrix; or None."""


FROZEN_WEIGHTS = "_layersample_frozen_weights"
"""Attribute of a model with weights that are held rounded: its layersample.frozen.weights.FrozenWeights."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of ``torch.compile``'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            warn_once(
                logger,
                inner,
                "torch.compile of a whole model compiles one graph for every set of active layers and gives up "
                "after 8; compile each layer instead: for layer in model.model.layers: layer.compile().",
            )
            model = inner
        else:
            return model


def optimizers_inside(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those inside of it: accelerate's wrapper, SAM and others step one that has the same groups."""
    found = [optimizer]
    while (inner := _inner(found[-1])) is not None:
        found.append(inner)
    return found


def optimizers_beside(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one steps in turn, each some of its parameters (a chain of Muon and AdamW); none of others.

    They are its members only where they share its parameters among them: each parameter is in one, and none is left.
    """
    own = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    found: list[Optimizer] = []
    for value in vars(optimizer).values():
        found += [o for o in optimizers_in(value) if not any(o is known for known in found)]
    parts = [id(p) for other in found for group in other.param_groups for p in group["params"]]
    return found if len(found) > 1 and len(parts) == len(own) and set(parts) == set(own) else []


def optimizers_in(value: object) -> Iterator[Optimizer]:
    """Optimizers that an attribute is or lists."""
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, Optimizer))
    elif isinstance(value, list | tuple | set | nn.Module):
        items = value.children() if isinstance(value, nn.Module) else value
        yield from (item for item in items if isinstance(item, Optimizer))


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of accelerate's and other wrappers."""
    return optimizers_inside(optimizer)[-1]


def _inner(optimizer: Optimizer) -> Optimizer | None:
    for name in ("optimizer", "base_optimizer", "optim"):
        inner = getattr(optimizer, name, None)
        # Whatever the name, it is the one inside only where both work on the same.
        if isinstance(inner, Optimizer) and inner is not optimizer and _same_groups(inner, optimizer):
            return inner
    return None


def _same_groups(one: Optimizer, other: Optimizer) -> bool:
    groups, others = one.param_groups, getattr(other, "param_groups", ())
    return len(groups) == len(others) and all(a is b for a, b in zip(groups, others, strict=True))


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, without the second or more that importing them takes where there are none."""
    module = sys.modules.get("torch.distributed.tensor")  # what isn't imported makes none
    return module is not None and isinstance(tensor, module.DTensor)


def is_fake(tensor: object) -> bool:
    """Whether a tensor has no values, as in a plan."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds: of a DTensor its shard, of any other all of it."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: torch.Tensor = to_local()
    return part


def exact_values(weight: torch.Tensor) -> torch.Tensor:
    """A weight's exact values, also while the device holds it rounded: then in the host's memory, not a copy."""
    frozen = getattr(weight, FROZEN, None)
    exact: torch.Tensor = weight if frozen is None else frozen.exact()
    return exact


def exact_model(model: nn.Module) -> AbstractContextManager[None]:
    """For a while, have a model show and compute with the exact values of weights that are held rounded."""
    frozen = getattr(unwrap(model), FROZEN_WEIGHTS, None)
    shown: AbstractContextManager[None] = nullcontext() if frozen is None else frozen.exact()
    return shown
