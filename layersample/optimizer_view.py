"""What an optimizer works on while it steps: a parameter itself, its fp32 master, or a low-rank part of it.

Any torch optimizer can so train bf16 weights exactly and keep its state at low rank. Before a step, parameters
are replaced in ``param_groups`` by others of the right type and shape; after it, the user's own are back, and
what the optimizer did is applied to them. All that must last is in ``optimizer.state`` of the user's parameter,
as tensors: the optimizer's own state, ``master_*`` and ``projection_*``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.masters import AT_REST, MASTER, combine, split
from layersample.projection import LowRankStep, Projection, ProjectionContext
from layersample.weight_decay import decays_decoupled, scales_by_weight

BASIS, STEPS, _PREFIX = "projection_basis", "projection_steps", "projection_"
_PACKED = "layersample"

# State of torch's and transformers' optimizers that follows a change of basis: linear in the gradient, or in
# its squares. What isn't listed stays as it is.
_LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "exp_avg_sq_row")


class NonFiniteGradientError(RuntimeError):
    """A gradient that is to be projected is NaN or infinite; the message says where and when."""


@dataclass
class _Replacement:
    """What the optimizer steps on in place of a parameter.

    Args:
        parameter: The user's parameter.
        stand_in: What replaces it, with a gradient.
        kept: The part of the parameter's state that isn't the optimizer's own.
        group: The parameter's group.
        low_rank: The step so far, where the stand-in has a low rank.
        start: The value that every element of a low-rank stand-in has before the step.
    """

    parameter: nn.Parameter
    stand_in: nn.Parameter
    kept: dict[str, Tensor]
    group: dict[str, Any]
    low_rank: LowRankStep | None = None
    start: float = 0.0


class OptimizerView:
    """Makes an optimizer step on masters and low-rank parameters in place of the user's.

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper of one.
        projection: The low-rank projection; ``None`` for full rank.
        master_weights: Whether bf16 parameters have fp32 masters.
        seed: Seed of the projection's randomness.

    Raises:
        ConfigError: If the optimizer's weight decay can't be told apart from its update, or masters are asked for
            of sharded parameters.
    """

    def __init__(
        self, optimizer: Optimizer, *, projection: Projection | None, master_weights: bool, seed: int
    ) -> None:
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._projection, self._master_weights, self._seed = projection, master_weights, seed
        if projection is not None:
            for group in self._optimizer.param_groups:
                decays_decoupled(self._optimizer, group)
        if any(isinstance(p, DTensor) and self.has_master(p) for p in _parameters(self._optimizer)):
            raise ConfigError(
                "Master weights of sharded bf16 parameters aren't kept: shard the model in float32 with "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16), whose shards are the masters, or choose "
                "master_weights=False, which loses small updates."
            )
        self._projected: dict[nn.Parameter, str] = {}
        self._replaced: list[_Replacement] = []
        self._groups: list[dict[str, Any]] = []
        self._parameters: list[list[nn.Parameter]] = []
        self._skips = False
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_state_dict_pre_hook(lambda _: self._restore()),
            self._optimizer.register_state_dict_post_hook(self._pack),
            self._optimizer.register_load_state_dict_post_hook(self._unpack),
        ]
        self._unpack(self._optimizer)  # where the optimizer was loaded before, as in the Trainer

    def close(self) -> None:
        """Leave the optimizer as it was found; its state stays."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def project(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Say which parameters are projected from now on, by name."""
        self._projected = {parameter: name for name, parameter in parameters.items()}

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put away what frozen parameters hold: masters become remainders, and bases are forgotten."""
        keeps_basis = self._projection is not None and self._projection.rotate_moments
        for parameter in parameters:
            state = self._optimizer.state.get(parameter)
            if not state:
                continue
            if MASTER in state:
                state.update(split(state.pop(MASTER), parameter.detach()))
            for key in [k for k in state if k.startswith(_PREFIX) and not (k == BASIS and keeps_basis)]:
                del state[key]

    def forget(self) -> None:
        """Drop all state but exact weights: of another projection, it has other shapes."""
        for state in self._optimizer.state.values():
            for key in [key for key in state if key != MASTER and key not in AT_REST]:
                del state[key]

    def has_master(self, parameter: Tensor) -> bool:
        """Whether a parameter trains on an fp32 master."""
        return self._master_weights and parameter.dtype == torch.bfloat16

    # A step

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        if not any(
            p in self._projected or self.has_master(p) for g in optimizer.param_groups for p in g["params"]
        ):
            return
        if any(
            value is not None for value in (*args[1:2], kwargs.get("closure"))
        ):  # args[0] is the optimizer
            raise ConfigError(
                "optimizer.step(closure) computes gradients inside of the step, where neither a projection nor "
                "master weights can reach them: call backward() before step()."
            )
        # GradScaler leaves it to a fused optimizer to undo the scale, and to skip a step that overflowed.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        self._skips = overflow is not None and bool(overflow)
        if not self._skips:
            self._check_gradients(optimizer)
        self._groups = list(optimizer.param_groups)
        self._parameters = [group["params"] for group in self._groups]
        try:
            self._enter_step(optimizer, scale)
        except BaseException:
            self._restore()
            raise

    def _enter_step(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        for group in self._groups:
            low_rank: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter in self._projected:
                    low_rank.append(self._make_low_rank(parameter, group, scale))
                elif self.has_master(parameter):
                    others.append(self._make_master(parameter, group))
                else:
                    others.append(parameter)
            group["params"] = others
            if low_rank:  # their weight decay is that of the whole weight, which we apply
                optimizer.param_groups.append({**group, "params": low_rank, "weight_decay": 0.0})

    def _check_gradients(self, optimizer: Optimizer) -> None:
        gradients = {p: p.grad for p in self._projected if p.grad is not None}
        # A sum is five times as fast as a look at every element, and finite only where those are.
        sums = [whole(gradient.sum(dtype=torch.float32)) for gradient in gradients.values()]
        if not sums or all(torch.stack(sums).isfinite().tolist()):
            return
        bad = next((p for p, gradient in gradients.items() if not whole(gradient.isfinite().all())), None)
        if bad is None:
            return
        steps = int(optimizer.state.get(bad, {}).get(STEPS, 0))
        raise NonFiniteGradientError(
            f"The gradient of {self._projected[bad]} is NaN or infinite at its step {steps + 1} since it was "
            f"activated. Nothing has changed: skip this batch (zero_grad() and go on), or lower the learning rate."
        )

    def _make_master(self, parameter: nn.Parameter, group: dict[str, Any]) -> nn.Parameter:
        own, kept = self._take_state(parameter)
        assert parameter.grad is not None
        stand_in = nn.Parameter(kept[MASTER])
        stand_in.grad = parameter.grad.float()
        self._replace(_Replacement(parameter, stand_in, kept, group), own)
        return stand_in

    def _make_low_rank(
        self, parameter: nn.Parameter, group: dict[str, Any], scale: Tensor | None
    ) -> nn.Parameter:
        assert self._projection is not None and parameter.grad is not None
        own, kept = self._take_state(parameter)
        weight = kept.get(MASTER, parameter.detach())

        def whole_gradient() -> Tensor:
            return self._whole_gradient(parameter, weight, group, scale)

        gradient = whole_gradient()
        basis = self._find_basis(gradient, own, kept, parameter)
        low_rank = share(basis.mT @ gradient)  # (rank, n)
        start = 0.0
        if scales_by_weight(self._optimizer, group):  # it must see the size that the weight has
            start = float(whole(torch.linalg.vector_norm(weight))) / math.sqrt(weight.numel())
        stand_in = nn.Parameter(torch.full_like(low_rank, start))
        stand_in.grad = (
            low_rank.clone() if scale is None else low_rank * scale
        )  # the optimizer may overwrite it
        step = LowRankStep(
            whole_gradient=whole_gradient,
            basis=basis,
            low_rank_gradient=low_rank,
            change=stand_in.detach(),
            learning_rate=float(group["lr"] or 0),
            descends=not group.get("maximize", False),
            state={
                k.removeprefix(_PREFIX): v
                for k, v in kept.items()
                if k.startswith(_PREFIX) and k not in (BASIS, STEPS)
            },
        )
        self._replace(_Replacement(parameter, stand_in, kept, group, step, start), own)
        return stand_in

    def _whole_gradient(
        self, parameter: nn.Parameter, weight: Tensor, group: dict[str, Any], scale: Tensor | None
    ) -> Tensor:
        """A gradient in fp32 or fp64, turned so that the basis acts on its first dimension: ``(k, n)``."""
        assert self._projection is not None and parameter.grad is not None
        gradient = parameter.grad if parameter.dtype == torch.float64 else parameter.grad.float()
        if scale is not None:
            gradient = gradient / scale
        decay = group.get("weight_decay", 0)
        if decay and not decays_decoupled(self._optimizer, group):  # then it is a part of the gradient
            gradient = gradient.add(weight, alpha=-decay if group.get("maximize", False) else decay)
        return gradient if self._projection.is_left(weight.shape) else gradient.mT

    def _find_basis(
        self, gradient: Tensor, own: dict[str, Any], kept: dict[str, Tensor], parameter: nn.Parameter
    ) -> Tensor:
        assert self._projection is not None
        previous, counted = kept.get(BASIS), kept.get(STEPS)
        # A basis without a count is one of an earlier visit: stale, and good for nothing but turning moments.
        steps = 0 if counted is None else int(counted)
        if self._skips and previous is not None and counted is not None:
            return previous
        due = steps % self._projection.update_gap == 0
        turned = not self._projection.is_left(parameter.shape)
        context = ProjectionContext(self._projected[parameter], steps, self._seed, turned)
        # A checkpoint may bring it back in another layout, and products differ in their last bits by layout.
        basis = self._projection.basis(gradient, None if due else previous, context).contiguous()
        if self._projection.rotate_moments and previous is not None and basis is not previous:
            _rotate(own, basis.mT @ previous)
        return basis

    def _take_state(self, parameter: nn.Parameter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Split a parameter's state into the optimizer's own and ours; a master is made where one is due."""
        state = self._optimizer.state.pop(parameter, {})
        kept = {key: value for key, value in state.items() if key.startswith((_PREFIX, "master_"))}
        own = {key: value for key, value in state.items() if key not in kept}
        if self.has_master(parameter):
            kept[MASTER] = combine(parameter, kept)
            for key in AT_REST:
                kept.pop(key, None)
        return own, kept

    def _replace(self, replacement: _Replacement, own: dict[str, Any]) -> None:
        if own:  # an empty entry would be taken for one that is set up
            self._optimizer.state[replacement.stand_in] = own
        self._replaced.append(replacement)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for replacement in self._replaced:
            if not self._skips:
                self._apply(replacement)
        self._restore()

    def _apply(self, done: _Replacement) -> None:
        weight = done.kept.get(MASTER, done.parameter.detach())
        if done.low_rank is not None:
            assert self._projection is not None
            step, group = done.low_rank, done.group
            step.change.sub_(done.start)
            decay = group.get("weight_decay", 0)
            if decay and decays_decoupled(self._optimizer, group):
                weight.mul_(1 - step.learning_rate * decay)
            left = self._projection.is_left(weight.shape)
            self._projection.apply(weight if left else weight.mT, step)
            done.kept |= {f"{_PREFIX}{key}": value for key, value in step.state.items()}
            done.kept[BASIS] = step.basis
            done.kept[STEPS] = torch.tensor(int(done.kept.get(STEPS, 0)) + 1)
        if MASTER in done.kept:
            done.parameter.detach().copy_(weight)

    def _restore(self) -> None:
        """Put the user's parameters back; after a step that raised, its state as well."""
        for replacement in self._replaced:
            own = self._optimizer.state.pop(replacement.stand_in, {})
            if own or replacement.kept:
                self._optimizer.state[replacement.parameter] = {**own, **replacement.kept}
        for group, parameters in zip(self._groups, self._parameters, strict=True):
            group["params"] = parameters
        if self._groups:
            del self._optimizer.param_groups[len(self._groups) :]
        self._replaced, self._groups, self._parameters = [], [], []

    # A checkpoint: torch casts a parameter's state to its type in loading, but leaves what is under other keys

    def _pack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Move the state of bf16 parameters, which is fp32, to where it keeps its type."""
        states = state_dict["state"]
        masters = [i for i, p in enumerate(_parameters(optimizer)) if i in states and self.has_master(p)]
        if masters:
            state_dict["state"] = {i: state for i, state in states.items() if i not in masters}
            state_dict["state"][_PACKED] = {i: states[i] for i in masters}

    def _unpack(self, optimizer: Optimizer) -> None:
        """Move it back, by the parameter's number."""
        packed: dict[int, dict[str, Any]] = optimizer.state.pop(_PACKED, {})  # type: ignore[call-overload]
        parameters = _parameters(optimizer)
        for index, state in packed.items():
            device = parameters[index].device
            optimizer.state[parameters[index]] = {
                # Copies: a step changes its state in place, and the checkpoint isn't ours. Counters and what is at
                # rest stay on the CPU.
                key: value.to("cpu" if key in AT_REST or value.dim() == 0 else device, copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """An optimizer's parameters in the order in which its checkpoints number them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is; of a DTensor, its whole value."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(low_rank: Tensor) -> Tensor:
    """A low-rank gradient ``(rank, n)`` as it is; of a DTensor that ranks must add up, one part of n for each rank."""
    if not isinstance(low_rank, DTensor):
        return low_rank
    parts = [Shard(low_rank.dim() - 1) if p.is_partial() else p for p in low_rank.placements]
    return low_rank.redistribute(placements=parts)
