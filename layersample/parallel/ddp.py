"""DistributedDataParallel: its reducer is built anew at each switch, with buckets of active parameters only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layersample.errors import ConfigError
from layersample.parallel.base import Engine

logger = logging.getLogger(__name__)

# What a rebuild uses of DDP that is private; without any of it, DDP has to look for unused parameters itself.
_PRIVATE = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")


class DDPEngine(Engine):
    """DistributedDataParallel around a model.

    DDP counts on a gradient of every parameter that required one when it was wrapped. At each switch its
    reducer, which holds the buckets and the gradient hooks, is built anew from the parameters that train now,
    by DDP's own methods. So buckets are as small as the active layers, and nothing looks for unused
    parameters. Where that can't be done, ``find_unused_parameters=True`` is exact too, with buckets of full size.

    Args:
        wrapper: The wrapper, made while every parameter that may train required a gradient.
        model: The model inside.

    Raises:
        ConfigError: If the wrapper has ``static_graph=True``, or can neither be rebuilt nor looks for unused
            parameters.
    """

    def __init__(self, wrapper: DistributedDataParallel, model: nn.Module) -> None:
        super().__init__(model)
        self.wrapper = wrapper
        if wrapper.static_graph:
            raise ConfigError(
                "DistributedDataParallel must be made with static_graph=False, because another set of layers trains "
                "in each period, but got static_graph=True (ddp_static_graph of the Trainer)."
            )
        reason = _why_not_rebuilt(wrapper)
        self.rebuilds = reason is None
        if reason is not None:
            if not wrapper.find_unused_parameters:
                raise ConfigError(
                    f"DistributedDataParallel must be made with find_unused_parameters=True here, because its "
                    f"buckets can't be rebuilt for each set of layers: {reason}."
                )
            logger.warning("DDP keeps buckets of all parameters, because %s.", reason)

    def prepare(self) -> None:
        """Nothing to do: the wrapper runs the model, and is known."""

    def switched(self, active: Sequence[str], round: int) -> None:
        """Build the reducer anew, once the ranks agree."""
        super().switched(active, round)
        self._rebuild()

    def _rebuild(self) -> None:
        if self.rebuilds:
            rebuild_reducer(self.wrapper)

    def close(self) -> None:
        """Build the reducer of all parameters again."""
        super().close()
        self._rebuild()

    @property
    def groups(self) -> list[dist.ProcessGroup | None]:
        """The ranks whose gradients are averaged."""
        return [self.wrapper.process_group]


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Make DDP average the gradients of exactly the parameters that require one now.

    Call it on all ranks, between an optimizer step and the next forward. Communication hooks stay.
    """
    ddp: Any = wrapper  # its private methods have no types
    hooks = list(ddp._comm_hooks)
    builtin = _builtin_hook(ddp)
    # The old hooks first: two reducers on one parameter would average its gradient twice.
    ddp.reducer._remove_autograd_hooks()
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, static_graph=False)
    ddp._has_rebuilt_buckets = False
    ddp._comm_hooks = []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)


def _why_not_rebuilt(wrapper: DistributedDataParallel) -> str | None:
    lacking = [name for name in _PRIVATE if not hasattr(wrapper, name)]
    if lacking or not hasattr(getattr(wrapper, "reducer", None), "_remove_autograd_hooks"):
        return f"torch {torch.__version__} lacks what that needs"
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "DDP's own mixed_precision hangs on the first buckets"
    if getattr(wrapper, "_use_python_reducer", False):
        return "torch.compile's python_reducer takes the place of its buckets"
    if getattr(wrapper, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params averages parameters outside of its buckets"
    for hook, state in wrapper._comm_hooks:
        # fp16_compress_hook and the like have a process group for a state; PowerSGD's keeps errors by bucket.
        if state is not None and not isinstance(state, dist.ProcessGroup):
            return (
                f"the communication hook {hook.__qualname__} keeps state of its own ({type(state).__name__})"
            )
    return None


def _builtin_hook(ddp: Any) -> Any:
    """The hook of torch's own in C++, which DDP notes nowhere but in its log; None if there is none."""
    if ddp._comm_hooks:
        return None
    name = ddp._get_ddp_logging_data().get("comm_hook") or ""
    return getattr(
        dist.BuiltinCommHookType,  # type: ignore[attr-defined]
        str(name).rpartition(".")[2],
        None,
    )
