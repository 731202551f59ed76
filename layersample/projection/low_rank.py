"""One low-rank step: from a weight's gradient to a small parameter for the optimizer, and from that to the weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.projection.bases import product, wide_type
from layersample.projection.branches import Branch
from layersample.projection.projection import LowRankStep, Projection, ProjectionContext
from layersample.projection.weight_decay import decays_decoupled, scales_by_weight
from layersample.unwrapping import is_dtensor

PREFIX = "layersample_projection_"
OLD_PREFIX = "projection_"
"""What checkpoints of an older version have in its place."""
BASIS, STEPS = f"{PREFIX}basis", f"{PREFIX}steps"

# State of torch's and transformers' optimizers that follows a change of basis: linear in the gradient, or in
# its squares. What isn't listed stays as it is.
_LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "exp_avg_sq_row")


class NonFiniteGradientError(RuntimeError):
    """A gradient that is to be projected is NaN or infinite; the message says where and when.

    Args:
        where: The weight, and its step.
        updated: How many weights the same step has changed already: with a step in backward, those behind it.
    """

    def __init__(self, where: str, updated: int = 0) -> None:
        self.where = where
        changed = (
            f"{updated} weights that come later in the model have been updated in this step already: go back to the "
            "last checkpoint and skip this batch"
            if updated
            else "Nothing has changed: skip this batch (zero_grad() and go on)"
        )
        super().__init__(f"The gradient of {where}. {changed}, or lower the learning rate.")


@dataclass
class LowRankParameter:
    """What the optimizer steps on in place of a projected weight.

    Args:
        parameter: A parameter ``(rank, n)`` with a gradient.
        step: What becomes of its change.
        start: The value that all of its elements have before the step.
        full_rank: Whether it is ``(k, n)``, and steps on what the basis leaves out.
    """

    parameter: nn.Parameter
    step: LowRankStep
    start: float
    full_rank: bool = False


class LowRank:
    """Projects gradients before an optimizer's step, and applies its low-rank updates after it.

    Args:
        optimizer: The optimizer.
        projection: The projection.
        seed: Seed of the projection's randomness.

    Raises:
        ConfigError: If the optimizer's weight decay can't be told apart from its update.
    """

    def __init__(self, optimizer: Optimizer, projection: Projection, seed: int) -> None:
        for group in optimizer.param_groups:
            decays_decoupled(optimizer, group)
        self._optimizer, self._projection, self._seed = optimizer, projection, seed
        self.names: dict[Tensor, str] = {}
        """The parameters that are projected now, with their names."""
        self.branches: dict[Tensor, Branch] = {}
        """Those of them that get a part of their gradient by chance."""

    def check_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make sure that the gradients to be projected are finite, before anything is changed.

        Args:
            parameters: What the optimizer is about to step on.

        Raises:
            NonFiniteGradientError: If one isn't.
        """
        gradients = {p: p.grad for p in parameters if p in self.names and p.grad is not None}
        # A sum is many times as fast as a look at every element, and finite only where those are.
        sums = [whole(gradient.sum(dtype=torch.float32)) for gradient in gradients.values()]
        if not sums or all(torch.stack(sums).isfinite().tolist()):
            return
        bad = next((p for p, gradient in gradients.items() if not whole(gradient.isfinite().all())), None)
        if bad is None:  # finite elements, too large to be added up
            return
        steps = int(self._optimizer.state.get(bad, {}).get(STEPS, 0))
        raise NonFiniteGradientError(
            f"{self.names[bad]} is NaN or infinite at its step {steps + 1} since it was activated"
        )

    def begin(
        self,
        parameter: nn.Parameter,
        weight: Tensor,
        group: dict[str, Any],
        own: dict[str, Any],
        kept: Mapping[str, Tensor],
        *,
        scale: Tensor | None,
        skips: bool,
    ) -> LowRankParameter:
        """Project a gradient.

        Args:
            parameter: The user's parameter, with a gradient.
            weight: Its values, or its fp32 master.
            group: Its group.
            own: The optimizer's state of it, which turns with the basis.
            kept: Our state of it.
            scale: What GradScaler has multiplied gradients by, where it leaves it to the optimizer to undo that.
            skips: Whether the optimizer will skip this step, because a gradient overflowed.
        """

        def find_gradient(*, widen: bool = True) -> Tensor:
            return self._gradient(parameter, weight, group, scale, widen=widen)

        gradient = find_gradient(widen=not self._projection.takes_16_bits)
        basis = self._find_basis(gradient, own, kept, parameter, skips)
        low_rank = share(product(basis.mT, gradient))  # (rank, n)
        branch = self.branches.get(parameter)
        if branch is not None and branch.full_rank:
            low_rank = gradient.to(basis.dtype) - basis @ low_rank  # (k, n)
        if branch is not None:
            low_rank = low_rank * branch.factor
        start = 0.0
        if scales_by_weight(self._optimizer, group):  # it must see the size that the weight has
            start = float(whole(torch.linalg.vector_norm(weight))) / math.sqrt(weight.numel())
        small = nn.Parameter(torch.full_like(low_rank, start))
        # A copy, since the optimizer may overwrite its gradient.
        small.grad = low_rank.clone() if scale is None else low_rank * scale
        step = LowRankStep(
            whole_gradient=find_gradient,
            basis=basis,
            low_rank_gradient=low_rank,
            change=small.detach(),
            learning_rate=float(group["lr"] or 0),
            descends=not group.get("maximize", False),
            state={
                key.removeprefix(PREFIX): value
                for key, value in kept.items()
                if key.startswith(PREFIX) and key not in (BASIS, STEPS)
            },
        )
        return LowRankParameter(small, step, start, branch is not None and branch.full_rank)

    def finish(
        self, low_rank: LowRankParameter, weight: Tensor, group: dict[str, Any], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Apply what the optimizer did to the weight, and its group's weight decay.

        Returns:
            Our state of the parameter, after the step.
        """
        step = low_rank.step
        step.change.sub_(low_rank.start)
        decay = group.get("weight_decay", 0)
        if decay and decays_decoupled(self._optimizer, group):
            weight.mul_(1 - step.learning_rate * decay)
        left = self._projection.is_left(weight.shape)
        if low_rank.full_rank:
            (weight if left else weight.mT).add_(step.change, alpha=self._projection.scale)
        else:
            self._projection.apply(weight if left else weight.mT, step)
        return {
            **kept,
            **{f"{PREFIX}{key}": value for key, value in step.state.items()},
            BASIS: step.basis,
            STEPS: torch.tensor(int(kept.get(STEPS, 0)) + 1),
        }

    def shape_of(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of what the optimizer steps on in place of a weight ``(..., m, n)``."""
        longer = weight.shape[-1] if self._projection.is_left(weight.shape) else weight.shape[-2]
        return (*weight.shape[:-2], self._projection.rank, longer)

    def forget_basis(self, state: dict[str, Any]) -> None:
        """Forget the basis of a parameter that is frozen: a later visit starts anew.

        Where moments turn with the basis, it stays, without its count, to turn them then.
        """
        for key in [key for key in state if key.startswith(PREFIX)]:
            if key != BASIS or not self._projection.rotate_moments:
                del state[key]

    def _gradient(
        self,
        parameter: nn.Parameter,
        weight: Tensor,
        group: dict[str, Any],
        scale: Tensor | None,
        *,
        widen: bool,
    ) -> Tensor:
        """A gradient turned so that the basis acts on its first dimension: ``(k, n)``.

        In fp32 or fp64; a 16-bit one stays as it is where nothing asks for another.
        """
        gradient = parameter.grad
        assert gradient is not None
        decay = group.get("weight_decay", 0)
        coupled = bool(decay) and not decays_decoupled(self._optimizer, group)  # a part of the gradient
        if widen or coupled or scale is not None or is_dtensor(gradient):
            gradient = gradient.to(wide_type(gradient))
        if scale is not None:
            gradient = gradient / scale
        if coupled:
            gradient = gradient.add(weight, alpha=-decay if group.get("maximize", False) else decay)
        return gradient if self._projection.is_left(weight.shape) else gradient.mT

    def _find_basis(
        self,
        gradient: Tensor,
        own: dict[str, Any],
        kept: Mapping[str, Tensor],
        parameter: nn.Parameter,
        skips: bool,
    ) -> Tensor:
        previous, counted = kept.get(BASIS), kept.get(STEPS)
        if skips:  # the gradient isn't finite, and the step won't be applied
            zeros = (*gradient.shape[:-1], self._projection.rank)
            return gradient.new_zeros(zeros, dtype=wide_type(gradient))
        # A basis without a count is one of an earlier visit: stale, and good for nothing but turning moments.
        steps = 0 if counted is None else int(counted)
        due = steps % self._projection.update_gap == 0
        turned = not self._projection.is_left(parameter.shape)
        context = ProjectionContext(self.names[parameter], steps, self._seed, turned)
        # A checkpoint may bring it back in another layout, and products differ in their last bits by layout.
        basis = self._projection.basis(gradient, None if due else previous, context).contiguous()
        branch = self.branches.get(parameter)
        at_full_rank = branch is not None and branch.full_rank  # whose moments aren't in the basis
        turns = self._projection.rotate_moments and not at_full_rank
        if turns and previous is not None and basis is not previous:
            _rotate(own, basis.mT @ previous)
        return basis


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is; of a DTensor, its whole value."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def share(low_rank: Tensor) -> Tensor:
    """A low-rank gradient ``(rank, n)`` as it is; of a DTensor that ranks must add up, one part of n for each rank."""
    if not is_dtensor(low_rank):
        return low_rank
    from torch.distributed.tensor import Shard

    parts = [Shard(low_rank.dim() - 1) if p.is_partial() else p for p in low_rank.placements]
    return low_rank.redistribute(placements=parts)


def _rotate(state: dict[str, Any], rotation: Tensor) -> None:
    """Turn moments ``(rank, ...)`` into a new basis, as LDAdam does (arXiv 2410.16103).

    Args:
        state: The optimizer's own state of one parameter.
        rotation: New basis transposed times the old one, ``(rank, rank)``.
    """
    for keys, matrix in ((_LINEAR, rotation), (_SQUARED, rotation.square())):
        for key in keys:
            value = state.get(key)
            if isinstance(value, Tensor) and value.dim() > 0:
                vector = value.dim() < rotation.dim()
                turned = matrix.to(value) @ (value.unsqueeze(-1) if vector else value)
                state[key] = turned.squeeze(-1) if vector else turned
