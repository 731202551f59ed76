"""Whether optimizers can step one parameter at a time, as a step in the backward pass has them do."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.optim.optimizers import Optimizers
from layersample.optim.scalers import scaler_at_work
from layersample.unwrapping import is_fake, optimizers_inside

_NEEDS = "step_in_backward must step each parameter by itself"
_STEPS = 3
_SIDE = 8  # of the trial's matrices
_COPIED = (list, dict, set)


def check_one_at_a_time(optimizers: Optimizers) -> None:
    """Refuse optimizers whose step of a parameter isn't of that parameter alone.

    Each is tried: a twin of it, with the same options, steps three small matrices together, and another one after the
    other. One that clips by the norm of all gradients in its step, or counts its steps for all parameters at once,
    ends elsewhere.

    Args:
        optimizers: The optimizers.

    Raises:
        ConfigError: If the two differ, or a wrapper's own step would be passed over.
    """
    around = [
        w for o in optimizers.outer for w in optimizers_inside(o)[:-1] if not hasattr(w, "gradient_state")
    ]
    for wrapper in (*around, *(chain for chain, _ in optimizers.chains)):
        raise ConfigError(
            f"{_NEEDS}, but {type(wrapper).__name__} has a step of its own around that of "
            f"{', '.join(type(each).__name__ for each in optimizers.each)}, which would be passed over: give "
            "LayerScheduler the optimizers inside of it, or choose step_in_backward=False."
        )
    for each in optimizers.each:
        if _differs(each):
            raise ConfigError(
                f"{_NEEDS}, but what {type(each).__name__} does to one depends on the others (on a norm of all "
                "gradients, say, or a count of its steps): choose step_in_backward=False, or another optimizer, such "
                "as AdamW."
            )


def refuse_scaler() -> None:
    """Refuse a GradScaler that is in use: gradients would be applied with its scale on them.

    Raises:
        ConfigError: If there is one that is enabled and has scaled a loss.
    """
    if scaler_at_work():
        raise ConfigError(
            f"{_NEEDS} as soon as its gradient is there, but a GradScaler has multiplied the loss by its scale, "
            "and undoes that only in scaler.step(): train in bf16 without a scaler, or choose "
            "step_in_backward=False. A scaler of an earlier run must be deleted first. Nothing has changed."
        )


def clips_itself() -> str | None:
    """The name of the function with which a caller clips gradients, if one of those that run now does."""
    frame = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("torch", "transformers", "accelerate", "layersample"):
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                if name in frame.f_code.co_names:
                    return name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _differs(optimizer: Optimizer) -> bool:
    """Whether a step of all parameters is another than steps of one after the other; not where it can't be tried."""
    if any(is_fake(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        return False  # a plan has no values to compare
    try:
        together, alone = (list(_weights(optimizer, one_by_one=how)) for how in (False, True))
    except (
        Exception
    ):  # another's constructor may want more, and its step another device; both fail in any way
        return False
    # An implementation that takes several tensors at once may round otherwise than for one.
    return not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(together, alone, strict=True))


def _weights(optimizer: Optimizer, *, one_by_one: bool) -> Iterator[Tensor]:
    """Weights that a twin of an optimizer ends with."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(_SIDE, _SIDE, generator=generator)) for _ in range(3)]
    options = {
        k: copy.copy(v) for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")
    }
    options["lr"] = torch.full_like(lr, 1e-2) if isinstance(lr := options.get("lr"), Tensor) else 1e-2
    groups = [{**options, "params": parameters[:2]}, {**options, "params": parameters[2:]}]
    twin: Any = _twin(optimizer, groups)
    if callable(getattr(twin, "train", None)):  # schedule-free ones step in that mode alone
        twin.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(_STEPS):
            for number, parameter in enumerate(
                parameters
            ):  # of unlike sizes, so that a norm of all is another's
                gradient = torch.randn(_SIDE, _SIDE, generator=generator)
                parameter.grad = gradient * 10.0 ** (2 * number + step)
            if one_by_one:
                _step_one_by_one(twin, parameters)
            else:
                twin.step()
    return (parameter.detach() for parameter in parameters)


def _twin(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of the same kind and options over other parameters."""
    kind = type(optimizer)
    taken = inspect.signature(kind).parameters
    try:
        return kind(groups, **{key: value for key, value in optimizer.defaults.items() if key in taken})
    except Exception:  # it wants what isn't among its options, and fails in any way
        twin = kind.__new__(kind)
    own = {key: copy.copy(value) for key, value in vars(optimizer).items() if isinstance(value, _COPIED)}
    vars(twin).update({**vars(optimizer), **own, "state": defaultdict(dict), "param_groups": groups})
    vars(twin).pop("step", None)  # as a learning-rate scheduler has wrapped it, bound to the other
    for key in [key for key in vars(twin) if key.endswith("_hooks")]:
        vars(twin)[key] = OrderedDict()
    return twin


def _step_one_by_one(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    before: list[Any] = [group["params"] for group in optimizer.param_groups]
    for parameter in parameters:
        for group, own in zip(optimizer.param_groups, before, strict=True):
            group["params"] = [p for p in own if p is parameter]
        optimizer.step()
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group["params"] = own
