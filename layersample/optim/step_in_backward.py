"""The optimizer's step in the backward pass: a parameter is updated, and its gradient freed, once that is whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.choices import ClipBy
from layersample.errors import ConfigError
from layersample.projection.low_rank import NonFiniteGradientError
from layersample.unwrapping import unwrap_optimizer


@dataclass(frozen=True, kw_only=True)
class StepInBackward:
    """Options of a step in the backward pass.

    Gradients of active layers then never stand side by side, except under gradient accumulation, where they must
    until the last backward. Without clipping the result is that of an ordinary step, to the bit. Clipping by the
    norm of all gradients is impossible, because they are never there together; there are two others in its place.

    Args:
        accumulation: Backward passes of one optimizer step; the loop may step earlier, behind the last batches of an
            epoch. Accelerate and the Trainer know theirs, and this is ignored.
        max_norm: Largest norm, above 0; ``None`` doesn't clip.
        clip_by: ``"running"`` scales all gradients by what the norm of all of them would have asked for in the
            step before; ``"parameter"`` clips each parameter's own norm.

    Raises:
        ConfigError: If an option is out of bounds.

    References:
        Lv et al., arXiv 2306.09782 (LOMO).
    """

    accumulation: int = 1
    max_norm: float | None = None
    clip_by: ClipBy = "running"

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ConfigError(f"accumulation must be at least 1 backward pass, but got {self.accumulation}.")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"max_norm must be above 0, or None, but got {self.max_norm}.")
        if self.clip_by not in get_args(ClipBy):
            raise ConfigError(
                f"clip_by must be one of {', '.join(get_args(ClipBy))}, but got {self.clip_by!r}."
            )


def how_to_step(option: object) -> StepInBackward | None:
    """What an option ``step_in_backward`` means: ``True`` is a plain one.

    Raises:
        ConfigError: If it is neither a :class:`StepInBackward` nor true or false.
    """
    if option is None or isinstance(option, bool):
        return StepInBackward() if option else None
    if isinstance(option, StepInBackward):
        return option
    raise ConfigError(f"step_in_backward must be a StepInBackward, True or False, but got {option!r}.")


class BackwardStepper:
    """Steps an optimizer one parameter at a time, from hooks on the parameters.

    Args:
        optimizer: Any torch optimizer that treats each parameter by itself, or accelerate's wrapper of one.
        options: What to do.
    """

    def __init__(self, optimizer: Optimizer, options: StepInBackward) -> None:
        self._outer = optimizer
        self._optimizer = unwrap_optimizer(optimizer)
        self._options = options
        self._hooks: list[RemovableHandle] = []
        self._group_of: dict[Tensor, int] = {}
        self._passes: dict[Tensor, int] = {}
        self._standing = 0  # bytes of the gradients that exist now
        self._stepping = False
        self._updated = 0  # parameters, in the step that is under way
        self._squares: list[Tensor] = []
        self.norm: float | None = None
        """Norm of all gradients of the last whole step, before clipping; ``None`` before there was one."""
        self.largest_gradient = 0
        """Most bytes of gradients that stood side by side."""
        self._step_hook = self._optimizer.register_step_pre_hook(self._end_step)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step these parameters from now on, and no others."""
        self._unhook()
        for index, group in enumerate(self._optimizer.param_groups):
            self._group_of |= dict.fromkeys(group["params"], index)
        for parameter in parameters:
            hook = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def close(self) -> None:
        """Leave the steps to the loop again."""
        self._unhook()
        self._step_hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The running norm, which a resumed run clips by."""
        return {"norm": self.norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.norm = state["norm"]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._group_of.clear()
        self._passes.clear()
        self._standing = 0

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        size, passes = parameter.grad.nbytes, self._passes.get(parameter, 0)
        self._passes[parameter] = passes + 1
        self._standing += 0 if passes else size
        self.largest_gradient = max(self.largest_gradient, self._standing)
        if not self._is_whole(parameter):
            return
        self._passes[parameter] = 0
        self._standing -= size
        self._clip(parameter)
        groups = self._optimizer.param_groups
        before = [group["params"] for group in groups]
        self._stepping = True
        try:
            for index, group in enumerate(groups):
                group["params"] = [parameter] if index == self._group_of[parameter] else []
            self._optimizer.step()
        except NonFiniteGradientError as error:  # the other weights of this step may have been updated by now
            raise NonFiniteGradientError(error.where, self._updated) from error
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters
            self._stepping = False
        self._updated += 1
        parameter.grad = None

    def _is_whole(self, parameter: Tensor) -> bool:
        accelerate = getattr(self._outer, "gradient_state", None)
        if accelerate is not None:
            return bool(accelerate.sync_gradients)
        return self._passes[parameter] == self._options.accumulation

    def _clip(self, parameter: Tensor) -> None:
        gradient, limit = parameter.grad, self._options.max_norm
        assert gradient is not None
        # Of 16 bits in fp32; of fp64 as it is, which torch doesn't narrow.
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(gradient, dtype=wide)
        self._squares.append(norm.square())
        if limit is None:
            return
        if self._options.clip_by == "parameter":
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        elif self.norm is not None and self.norm > limit:
            gradient.mul_(limit / self.norm)

    @torch.no_grad()
    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The loop's own step ends one of ours. It finds work only where gradients still wait for more passes."""
        if self._stepping:
            return
        # A loop steps early behind the last batches of an epoch; the next window is a whole one again.
        for parameter, passes in self._passes.items():
            if passes and parameter.grad is not None:
                self._clip(parameter)
        self._passes.clear()
        self._standing = self._updated = 0
        if self._squares:
            norm = math.sqrt(float(torch.stack(self._squares).sum()))
            self.norm = norm if math.isfinite(norm) else self.norm
            self._squares.clear()
