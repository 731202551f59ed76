"""The optimizer's step in the backward pass: a parameter is updated, and its gradient freed, once that is whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.choices import ClipBy
from layersample.errors import ConfigError
from layersample.optim.by_identity import PLACEHOLDER, knows_places
from layersample.optim.norms import norm_of
from layersample.optim.one_at_a_time import check_one_at_a_time, clips_itself, refuse_scaler
from layersample.optim.optimizers import Optimizers
from layersample.option_files import Options, make_options
from layersample.options import MOST, option
from layersample.projection.low_rank import NonFiniteGradientError

logger = logging.getLogger(__name__)


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
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in make_options(_Limits, [("", given)], "option"):
            object.__setattr__(self, name, value)


class _Limits(Options):
    accumulation: int = option(1, "Backward passes of one optimizer step.", ge=1, le=MOST)
    max_norm: float | None = option(None, "Largest norm; none doesn't clip.", gt=0)
    clip_by: ClipBy = option("running", "Which norm it is.")


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
    """Steps optimizers one parameter at a time, from hooks on the parameters.

    Args:
        optimizers: Torch optimizers that treat each parameter by itself.
        options: What to do.

    Raises:
        ConfigError: If an optimizer's step of a parameter isn't of that parameter alone.
    """

    def __init__(self, optimizers: Optimizers, options: StepInBackward) -> None:
        check_one_at_a_time(optimizers)
        self._optimizers = optimizers
        self._options = options
        self._hooks: list[RemovableHandle] = []
        self._places: dict[Tensor, _Place] = {}
        self._num_groups: dict[Optimizer, int] = {}
        self._passes: dict[Tensor, int] = {}
        self._versions: dict[Tensor, int] = {}  # of gradients that wait for more passes
        self._standing = 0  # bytes of the gradients that exist now
        self._stepping = False
        self._updated = 0  # parameters, in the step that is under way
        self._stepped: set[Tensor] = set()  # those that have been updated since the loop's last step
        self._has_begun = self._has_ended = False
        self._squares: list[Tensor] = []
        self._ended: set[Optimizer] = set()  # those that the loop has stepped in the step that is ending
        self.slices: dict[Optimizer, Callable[[Tensor], Iterator[None]]] = {
            each: lambda _: iter([None]) for each in optimizers.each
        }
        """How often each optimizer is to step a parameter: once a slice of it."""
        self.norm: float | None = None
        """Norm of all gradients of the last whole step, before clipping; ``None`` before there was one."""
        self.largest_gradient = 0
        """Most bytes of gradients that stood side by side."""
        self._step_hooks = [o.register_step_pre_hook(self._end_step) for o in optimizers.each]

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step these parameters from now on, and no others."""
        self._unhook()
        self._find_places()
        for parameter in parameters:
            if self._counts_passes:
                before = partial(self._before_gradient, parameter)
                self._hooks.append(parameter.register_hook(before))  # type: ignore[no-untyped-call]
            hook = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def close(self) -> None:
        """Leave the steps to the loop again."""
        self._unhook()
        for hook in self._step_hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The running norm, which a resumed run clips by."""
        return {"norm": self.norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.norm = state["norm"]

    @property
    def _counts_passes(self) -> bool:
        """Whether a gradient may be one of a window's earlier passes."""
        accelerated = any(hasattr(optimizer, "gradient_state") for optimizer in self._optimizers.outer)
        return accelerated or self._options.accumulation > 1

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._passes.clear()
        self._versions.clear()
        self._standing = 0

    def _find_places(self) -> None:
        self._places.clear()
        for optimizer in self._optimizers.each:
            self._num_groups[optimizer] = len(optimizer.param_groups)
            padded = knows_places(optimizer)
            for index, group in enumerate(optimizer.param_groups):
                for number, parameter in enumerate(group["params"]):
                    self._places[parameter] = _Place(optimizer, index, number if padded else 0)

    def _place_of(self, parameter: Tensor) -> _Place:
        place = self._places[parameter]
        if len(place.optimizer.param_groups) != self._num_groups[place.optimizer]:  # some came or went
            self._find_places()
            place = self._places[parameter]
        return place

    def _before_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """A window that the loop has dropped begins anew: by zero_grad(), or one that sets gradients to zero."""
        if not self._passes.get(parameter):
            return
        standing = parameter.grad
        # A look at every element takes time; torch counts what is written to a gradient between two passes.
        if standing is not None and (standing._version == self._versions[parameter] or has_values(standing)):
            return
        self._standing -= size_of(parameter if standing is None else standing)
        self._passes[parameter] = 0

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not self._has_begun:
            refuse_scaler()
            self._has_begun = True
        if parameter in self._stepped:
            raise ConfigError(self._second_pass())
        size, passes = size_of(parameter.grad), self._passes.get(parameter, 0)
        self._passes[parameter] = passes + 1
        self._standing += 0 if passes else size
        self.largest_gradient = max(self.largest_gradient, self._standing)
        if not self._is_whole(parameter):
            self._versions[parameter] = parameter.grad._version
            return
        self._passes[parameter] = 0
        self._standing -= size
        self._clip(parameter)
        optimizer, index, number = self._place_of(parameter)
        groups = optimizer.param_groups
        before = [group["params"] for group in groups]
        self._stepping = True
        try:
            for i, group in enumerate(groups):
                group["params"] = [*[PLACEHOLDER] * number, parameter] if i == index else []
            for _ in self.slices[optimizer](parameter):
                optimizer.step()
        except NonFiniteGradientError as error:  # the other weights of this step may have been updated by now
            raise NonFiniteGradientError(error.where, self._updated) from error
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters
            self._stepping = False
        self._updated += 1
        self._stepped.add(parameter)
        parameter.grad = None

    def _second_pass(self) -> str:
        return (
            "step_in_backward must be told how many backward passes a step has, but with "
            f"accumulation={self._options.accumulation} a parameter that has been updated got another gradient before "
            "the loop's optimizer.step(): choose StepInBackward(accumulation=...), add losses up for one backward "
            "pass, or choose step_in_backward=False. The updates of the first pass are done, and zero_grad() can't "
            "take them back: go back to the last checkpoint, or begin anew."
        )

    def _is_whole(self, parameter: Tensor) -> bool:
        if any(hasattr(optimizer, "gradient_state") for optimizer in self._optimizers.outer):
            return not self._optimizers.waits  # accelerate knows
        return self._passes[parameter] == self._options.accumulation

    def _clip(self, parameter: Tensor) -> None:
        gradient, limit = parameter.grad, self._options.max_norm
        assert gradient is not None
        values = whole = gradient
        if gradient.is_sparse:  # of an embedding: rows that occur twice add up, in the norm as in the step
            wide = torch.promote_types(gradient.dtype, torch.float32)
            values, whole = gradient._values(), gradient.to(wide).coalesce().values()
        norm = norm_of(whole)
        self._squares.append(norm.square())
        if limit is None:
            return
        if self._options.clip_by == "parameter":
            values.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        elif self.norm is not None and self.norm > limit:
            values.mul_(limit / self.norm)

    @torch.no_grad()
    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The loop's own step ends one of ours. It finds work only where gradients still wait for more passes.

        The loop steps each of several optimizers; one that it steps again begins another step.
        """
        if self._stepping:
            return
        self._name_clipping()
        self.end_step(optimizer)
        if optimizer in self._ended:
            self._note_norm()
        self._ended.add(optimizer)
        # A loop steps early behind the last batches of an epoch; the next window is a whole one again.
        for parameter in [p for p, passes in self._passes.items() if passes]:
            if self._places[parameter].optimizer is optimizer:
                self._passes[parameter] = 0
                if parameter.grad is not None:
                    self._standing -= size_of(parameter.grad)
                    self._clip(parameter)
        if len(self._ended) == len(self._optimizers.each):
            self._note_norm()
            self._standing = self._updated = 0

    def end_step(self, optimizer: Optimizer | None = None) -> None:
        """The loop's step is done: of one optimizer, or of all."""
        if optimizer is None:
            self._stepped.clear()
        else:
            self._stepped = {p for p in self._stepped if self._place_of(p).optimizer is not optimizer}

    def _name_clipping(self) -> None:
        """Say once what becomes of a loop's own clipping: it finds no gradients."""
        function = None if self._has_ended or not self._has_begun else clips_itself()
        self._has_ended = True
        if function is not None:
            logger.warning(
                "The loop calls %s, which finds no gradients and clips nothing under step_in_backward: choose "
                "StepInBackward(max_norm=...) in its place.",
                function,
            )

    def _note_norm(self) -> None:
        self._ended.clear()
        if self._squares:
            norm = math.sqrt(float(torch.stack(self._squares).sum()))
            self.norm = norm if math.isfinite(norm) else self.norm
            self._squares.clear()


class _Place(NamedTuple):
    """Where a parameter is: its optimizer, the number of its group, and its number there where that matters."""

    optimizer: Optimizer
    group: int
    number: int


def has_values(gradient: Tensor) -> bool:
    """Whether a gradient isn't zero everywhere."""
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def size_of(gradient: Tensor) -> int:
    """Bytes of a gradient, sparse or not."""
    if not gradient.is_sparse:
        return gradient.nbytes
    return gradient._values().nbytes + gradient._indices().nbytes
