"""An optimizer's checkpoint: state keeps its type and place, and what an older version wrote is read as well.

torch casts a parameter's state to its type in loading, but leaves alone what is under other keys. So the state of
16-bit parameters that is wider than they are is moved to a key of ours, by the parameters' numbers. Beside it are the
weights with which a period began, where a sampler wants to know how far they move in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.optim.masters import AT_REST, OLD_NAMES
from layersample.projection.low_rank import OLD_PREFIX, PREFIX
from layersample.unwrapping import is_dtensor, unwrap_optimizer

PACKED = "layersample"
_STEP, _BEGUN = "step", "begun"  # what is under it besides the parameters' numbers
# What checkpoints that were loaded hold of the weights with which their period began, until somebody takes it.
_begun: WeakKeyDictionary[Optimizer, dict[int, Tensor]] = WeakKeyDictionary()
_OLD_BASIS = f"{OLD_PREFIX}basis"


def pack(
    optimizer: Optimizer, state_dict: dict[str, Any], *, shards: bool, has_master: Callable[[Tensor], bool]
) -> None:
    """Move the state of 16-bit parameters that is wider than they are to where it keeps its type.

    Args:
        optimizer: The optimizer.
        state_dict: Its checkpoint, which is changed. Before loading, what isn't there yet is moved.
        shards: Whether state of shards is moved too. In saving it isn't: it goes through
            torch.distributed.checkpoint, which looks state up by its parameter; so does whoever saves whole tensors
            by it, see :func:`unpacked`.
        has_master: Whether a parameter trains on an fp32 master.
    """
    states = dict(state_dict["state"])
    ids = [key for group in state_dict["param_groups"] for key in group["params"]]
    packed = {
        index: states.pop(key)
        for index, (key, parameter) in enumerate(zip(ids, parameters_of(optimizer), strict=False))
        if key in states
        and (shards or not is_dtensor(parameter))
        and (has_master(parameter) or _loses(optimizer, parameter, states[key]))
    }
    if packed:
        # Some of torch's optimizers look in loading for a step in the first state there is.
        state_dict["state"] = {
            **states,
            PACKED: {_STEP: torch.tensor(0.0), **states.get(PACKED, {}), **packed},
        }


def add_begun(state_dict: dict[str, Any], weights: Mapping[int, Tensor]) -> None:
    """Put the weights with which a period began into an optimizer's checkpoint.

    Args:
        state_dict: The checkpoint, which is changed.
        weights: Exact values in CPU memory, by the parameters' numbers.
    """
    if weights:
        state = state_dict["state"]
        held = {_STEP: torch.tensor(0.0), **state.get(PACKED, {}), _BEGUN: dict(weights)}
        state_dict["state"] = {**state, PACKED: held}


def take_begun(optimizer: Optimizer) -> dict[int, Tensor]:
    """What the loaded checkpoint holds of the weights with which its period began; a second time nothing."""
    return _begun.pop(optimizer, {})


def forget_begun(optimizer: Optimizer) -> None:
    """Another checkpoint is loaded: what an earlier one held isn't of it."""
    _begun.pop(optimizer, None)


def unpack(optimizer: Optimizer) -> None:
    """Move it back, by the parameter's number, under the names of this version."""
    packed: dict[Any, dict[Any, Any]] = optimizer.state.pop(PACKED, {})  # type: ignore[call-overload]
    if _BEGUN in packed:
        _begun[optimizer] = packed[_BEGUN]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for index, parameter in enumerate(parameters_of(optimizer)):
        if index in packed:
            optimizer.state[parameter] = {
                key: _placed(key, value, parameter, groups[index])
                for key, value in _under_new_names(packed[index]).items()
            }
        elif _OLD_BASIS in optimizer.state.get(parameter, {}):
            optimizer.state[parameter] = _under_new_names(optimizer.state[parameter])


@contextmanager
def unpacked(optimizer: Optimizer) -> Iterator[None]:
    """Have the optimizer's ``state_dict()`` hold all state under its parameters' numbers for a while.

    Args:
        optimizer: The optimizer, or accelerate's wrapper of it.
    """

    def move_back(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        states = dict(state_dict["state"])
        packed = states.pop(PACKED, {})
        state_dict["state"] = {
            **{key: value for key, value in packed.items() if key not in (_STEP, _BEGUN)},
            **states,
        }

    # It runs after that of a view.
    handle = unwrap_optimizer(optimizer).register_state_dict_post_hook(move_back)
    try:
        yield
    finally:
        handle.remove()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """An optimizer's parameters in the order in which its checkpoints number them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _under_new_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with our keys as they are named now; an optimizer's own may look like the old ones."""
    projected = _OLD_BASIS in state

    def name(key: str) -> str:
        if projected and key.startswith(OLD_PREFIX):
            return PREFIX + key.removeprefix(OLD_PREFIX)
        return OLD_NAMES.get(key, key)

    return {name(key): value for key, value in state.items()}


def _loses(optimizer: Optimizer, parameter: nn.Parameter, state: Mapping[str, Any]) -> bool:
    """Whether loading rounds some of a parameter's state, as torch does; an optimizer that loads by itself may not."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict or parameter.itemsize != 2:
        return False
    values = [value for key, value in state.items() if key != "step" and isinstance(value, Tensor)]
    return any(value.is_floating_point() and value.dtype != parameter.dtype for value in values)


def _placed(key: str, value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """A copy of some loaded state where it belongs; the checkpoint isn't ours to be changed by a step."""
    if not isinstance(value, Tensor):
        return value
    # An optimizer's own counts are on the device only where its kernels read them there.
    read_there = group.get("capturable") or (key == "step" and group.get("fused"))
    counts = value.dim() == 0 and (key.startswith(PREFIX) or not read_there)
    return value.to("cpu" if counts or key in AT_REST else parameter.device, copy=True)
