"""The optimizer's own state of one parameter: whether it fits what is stepped on, and what a plain optimizer takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.optim.masters import AT_REST, MASTER
from layersample.optim.packing import PACKED
from layersample.projection.low_rank import PREFIX

# Of optimizers whose scheduler is closed: the hooks that make them plain before they are used.
_plain: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()


def is_ours(key: str) -> bool:
    """Whether a key in the optimizer's state of a parameter is of this library."""
    return key == MASTER or key in AT_REST or (isinstance(key, str) and key.startswith(PREFIX))


def fits(state: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether an optimizer's own state can be of a parameter of some shape.

    Moments have the parameter's shape; torch's Adafactor has ones in place of some dimensions, and transformers' lacks
    one. Of anything else nothing is known.

    Args:
        state: The optimizer's own state of the parameter.
        shape: The shape ``(..., m, n)``.
    """
    factors = {"exp_avg_sq_row": tuple(shape[:-1]), "exp_avg_sq_col": (*shape[:-2], *shape[-1:])}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if key in factors and tuple(value.shape) != factors[key]:
            return False
        if value.dim() == len(shape) and not all(
            size in (1, full) for size, full in zip(value.shape, shape, strict=True)
        ):
            return False
    return True


def widened(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """State that an optimizer has made of a 16-bit parameter, for a step on its fp32 master."""
    return {
        key: value.float()
        if isinstance(value, Tensor) and value.dim() > 0 and value.dtype == parameter.dtype
        else value
        for key, value in state.items()
    }


def fresh_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer's constructor makes of a parameter: Adagrad's sums, which its steps then rely on.

    Returns:
        Nothing of one that makes its state at its first step, as most do.
    """
    options = {key: value for key, value in group.items() if key != "params"}
    try:
        twin = type(optimizer)([{**options, "params": [parameter]}], **optimizer.defaults)
    except Exception:  # another's constructor may want more, and then fail in any way
        return {}
    return dict(twin.state.get(parameter, {}))


def makes_state_when_made(optimizer: Optimizer) -> bool:
    """Whether an optimizer makes state in its constructor, and would miss it at a step."""
    if not any(optimizer.state.values()):
        return False
    return bool(fresh_state(optimizer, optimizer.param_groups[0], nn.Parameter(torch.zeros(2, 2))))


def plain_before_use(optimizer: Optimizer, make_plain: Callable[[], None]) -> None:
    """Have an optimizer made plain before it steps or is saved by itself, after loading a checkpoint as well.

    Not at once: until then another scheduler may go on from what it holds, or loads.

    Args:
        optimizer: The optimizer, which no view works on any more.
        make_plain: Makes it so; see :func:`make_plain`.
    """
    due = [True]

    def load(loaded: Optimizer) -> None:
        due[0] = True

    def use(*_: Any) -> None:
        if due[0]:
            due[0] = False
            make_plain()

    _plain[optimizer] = [
        optimizer.register_step_pre_hook(use),
        optimizer.register_state_dict_pre_hook(use),
        optimizer.register_load_state_dict_post_hook(load),
    ]


def end_plain(optimizer: Optimizer) -> None:
    """Leave an optimizer's state alone again, since a view knows what to do with it."""
    for handle in _plain.pop(optimizer, []):
        handle.remove()


def make_plain(optimizer: Optimizer, projected: Collection[Tensor]) -> None:
    """Leave in an optimizer what it can go on with by itself: state of a parameter's own size and type.

    Args:
        optimizer: The optimizer.
        projected: Parameters whose state may have a low rank.
    """
    optimizer.state.pop(PACKED, None)  # type: ignore[call-overload]
    eager = makes_state_when_made(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.pop(parameter, {})
            own = {key: value for key, value in state.items() if not is_ours(key)}
            low_rank = any(is_ours(key) and key.startswith(PREFIX) for key in state)
            if low_rank or (parameter in projected and not fits(own, parameter.shape)):
                own = {}
            own = _narrowed(own, parameter) or (fresh_state(optimizer, group, parameter) if eager else {})
            if own:  # an empty entry would be taken for one that is set up
                optimizer.state[parameter] = own


def _narrowed(own: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """State of the parameter's type, as torch's own loading leaves it; none where its kind isn't known."""
    wide = [v for v in own.values() if isinstance(v, Tensor) and v.dim() > 0 and v.dtype != parameter.dtype]
    if parameter.itemsize != 2 or not wide:
        return own
    if any(value.shape != parameter.shape or not value.is_floating_point() for value in wide):
        return {}
    return {
        key: value.to(parameter) if any(value is w for w in wide) else value for key, value in own.items()
    }
