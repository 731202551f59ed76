"""Which optimizers layers can be sampled under, as far as it shows: state by parameter, and one update a step."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.optim.frozen_state import has_two_weights
from layersample.optim.optimizers import Optimizers
from layersample.optim.packing import PACKED, parameters_of
from layersample.optim.whole_state import is_of_all, needs_closure
from layersample.unwrapping import optimizers_in, optimizers_inside

logger = logging.getLogger(__name__)

_NEEDS = "An optimizer must keep one entry of state a parameter, and step a parameter by that alone"


def check_supported(optimizers: Optimizers, *, offloads: bool, replaces: bool) -> None:
    """Refuse an optimizer that can't be right, by what shows when the scheduler is made.

    Args:
        optimizers: The optimizers.
        offloads: Whether the state of frozen layers is moved away.
        replaces: Whether it steps on masters or low-rank parameters in place of the user's.

    Raises:
        ConfigError: If a wrapper must run a closure, or an optimizer has others step its parameters as well, changes
            weights outside of its step, or is differentiated. It says what to do.
    """
    for outer in optimizers.outer:
        chain = optimizers_inside(outer)
        for optimizer in chain:
            if not any(optimizer is one for one in optimizers.each):
                _refuse_required_closure(optimizer)
            if not any(optimizer is one for one, _ in optimizers.chains):
                _refuse_chain(optimizer, chain)
        _refuse_two_weights(
            chain[-1], ok=not offloads and not replaces
        )  # accelerate's wrapper always has both
        _refuse_state_of_all(chain)
    for one, parts in optimizers.chains:
        _name_what_is_not_saved(one, parts)
    for optimizer in optimizers.each:
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ConfigError(
                f"{_name(optimizer)} must be made with differentiable=False, because layers are switched between "
                "steps, which can't be differentiated."
            )
        known = set(parameters_of(optimizer))
        check_state(optimizer, known, known)


def check_state(optimizer: Optimizer, known: Collection[Tensor], had_state: Collection[Tensor]) -> None:
    """Refuse an optimizer whose state isn't of its parameters, as it shows once there is some.

    Args:
        optimizer: The optimizer.
        known: Its parameters.
        had_state: Those that had state before its first step.

    Raises:
        ConfigError: If state is kept under something else, or was made for parameters without a gradient.
    """
    strange = [key for key in optimizer.state if key not in known and key != PACKED]
    if strange:
        kinds = sorted({"another tensor" if isinstance(k, Tensor) else repr(k) for k in strange})
        raise ConfigError(f"{_NEEDS}, but {_name(optimizer)} keeps state under {', '.join(kinds)}.")
    moved = [p for p in known if not p.requires_grad and p not in had_state and optimizer.state.get(p)]
    if moved and not is_of_all(optimizer):
        raise ConfigError(
            f"{_NEEDS}, but {_name(optimizer)} made state for {len(moved)} parameters that are frozen."
        )


class WrapperWatch:
    """Stops a wrapper that steps frozen parameters as well (Lookahead), at the first sign of it.

    Args:
        wrapper: The wrapper, which keeps state of its own.
        inner: The optimizer inside.
    """

    def __init__(self, wrapper: Optimizer, inner: Optimizer) -> None:
        self._wrapper = wrapper
        self._frozen_with_state: set[Tensor] = set()
        self._handle = inner.register_step_pre_hook(self._look)

    def switched(self) -> None:
        """Note what has state now that other layers train: that policy ``keep`` has left there."""
        self._frozen_with_state = set(self._with_state())

    def close(self) -> None:
        """Look no more."""
        self._handle.remove()

    def _with_state(self) -> Iterator[Tensor]:
        return (p for p, state in self._wrapper.state.items() if state and not p.requires_grad)

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(parameter not in self._frozen_with_state for parameter in self._with_state()):
            raise ConfigError(
                f"{_NEEDS}, but {_name(self._wrapper)} keeps state of frozen parameters as well, and would move them: "
                f"train with the {_name(optimizer)} inside of it."
            )


def refuse_capture(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before a step: a CUDA graph would go on training the layers that trained when it was captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "An optimizer's step can't be captured in a CUDA graph while layers are sampled: it would go on training "
            "the same layers. Capture the forward pass of each layer in its place."
        )


def _refuse_required_closure(optimizer: Optimizer) -> None:
    if needs_closure(optimizer):
        raise ConfigError(
            f"{_NEEDS}, but the step of {_name(optimizer)} needs a closure, which it runs as often as it likes, on "
            "state of all parameters together. Choose another optimizer, such as AdamW."
        )


def _refuse_chain(optimizer: Optimizer, inside: list[Optimizer]) -> None:
    own = {id(parameter) for parameter in parameters_of(optimizer)}
    others = [
        other
        for value in vars(optimizer).values()
        for other in optimizers_in(value)
        if not any(other is known for known in inside)
        and own & {id(parameter) for parameter in parameters_of(other)}
    ]
    if others:
        names = ", ".join(_name(other) for other in others)
        raise ConfigError(
            f"{_NEEDS}, but {_name(optimizer)} has others do it ({names}), whose state can't be reached through it: "
            "give LayerScheduler the list of them, LayerScheduler(model, [first, second], ...)."
        )


def _name_what_is_not_saved(chain: Optimizer, parts: Sequence[Optimizer]) -> None:
    if type(chain).state_dict is Optimizer.state_dict and all(
        part.state is not chain.state for part in parts
    ):
        logger.warning(
            "%s leaves the state of the optimizers that it steps (%s) out of its state_dict(): a checkpoint must keep "
            "theirs.",
            _name(chain),
            ", ".join(_name(part) for part in parts),
        )


def _refuse_two_weights(optimizer: Optimizer, *, ok: bool) -> None:
    if ok or not has_two_weights(optimizer):
        return
    raise ConfigError(
        f"{_NEEDS}, but {_name(optimizer)} has train() and eval(), between which it changes weights by their state: "
        "choose state='drop' or 'keep', no projection, and master_weights=False where weights are bf16; or another "
        "optimizer."
    )


def _refuse_state_of_all(chain: list[Optimizer]) -> None:
    inner = chain[-1]
    for wrapper in chain[:-1]:
        state = getattr(wrapper, "state", inner.state)
        if state is inner.state or any(inner.state.values()):
            continue
        if all(state.get(parameter) for parameter in parameters_of(inner)):
            raise ConfigError(
                f"{_NEEDS}, but {_name(wrapper)} has made state of every parameter before its first step, and would "
                f"move frozen ones: train with the {_name(inner)} inside of it."
            )


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__
