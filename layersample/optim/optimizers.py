"""The optimizers of one model as one: each steps some of its parameters, and holds the state of those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.optim.whole_state import is_of_all
from layersample.unwrapping import optimizers_beside, optimizers_inside


class Optimizers:
    """One optimizer, or several that share a model's parameters among them, such as Muon and AdamW.

    Args:
        given: A torch optimizer, a wrapper of one, a chain that steps some of them in turn, or a list of them, which
            the loop steps one after another.

    Raises:
        ConfigError: If something else was given, or one twice.
    """

    def __init__(self, given: Optimizer | Sequence[Optimizer]) -> None:
        self.given = given
        self.outer: tuple[Optimizer, ...] = (
            tuple(given) if isinstance(given, Sequence) else (given,)
        )  # wrappers, if any, as the loop steps them
        for optimizer in self.outer:
            if not hasattr(optimizers_inside(optimizer)[-1], "register_step_pre_hook"):
                raise ConfigError(
                    "The optimizer must be one of torch's kind, or a list of them, but there is a "
                    f"{type(optimizer).__name__}."
                )
        innermost = [optimizers_inside(optimizer)[-1] for optimizer in self.outer]
        members = [[optimizers_inside(m)[-1] for m in optimizers_beside(o)] for o in innermost]
        self.each: tuple[Optimizer, ...] = tuple(
            each for one, parts in zip(innermost, members, strict=True) for each in parts or [one]
        )
        """The optimizers themselves, without wrappers and chains."""
        if not self.each or len({id(optimizer) for optimizer in self.each}) < len(self.each):
            raise ConfigError(
                f"A list of optimizers must hold at least one, and each once, but it holds {len(self.each)}."
            )
        self.chains: tuple[tuple[Optimizer, Sequence[Optimizer]], ...] = tuple(
            (one, parts) for one, parts in zip(innermost, members, strict=True) if parts
        )
        """Those that have others step, each with these."""
        self.beside: tuple[tuple[Optimizer, Optimizer], ...] = tuple(
            (wrapper, (parts or [one])[0])
            for optimizer, one, parts in zip(self.outer, innermost, members, strict=True)
            for wrapper in [*optimizers_inside(optimizer)[:-1], *([one] if parts else [])]
            if all(getattr(wrapper, "state", each.state) is not each.state for each in parts or [one])
        )
        """Wrappers that keep state of their own beside that of the optimizer inside (SAM), each with that one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    @property
    def waits(self) -> bool:
        """Whether accelerate is in the middle of a window of gradient accumulation, in which no step is done."""
        states = [getattr(optimizer, "gradient_state", None) for optimizer in self.outer]
        return any(state is not None and not state.sync_gradients for state in states)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """What they hold of a parameter; no empty entry is made, as ``optimizer.state[parameter]`` would."""
        for optimizer in self.each:
            state: dict[str, Any] | None = optimizer.state.get(parameter)
            if state and not is_of_all(optimizer):
                return state
        return {}
