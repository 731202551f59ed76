"""What an optimizer works on while it steps: a parameter itself, its fp32 master, or a low-rank part of it.

Any torch optimizer can so train bf16 weights exactly and keep its state at low rank. Before a step, parameters
are replaced in ``param_groups`` by others of the right type and shape; after it, the user's own are back, and
what the optimizer did is applied to them. All that must last is in ``optimizer.state`` of the user's parameter,
as tensors: the optimizer's own state, and ours under keys that begin with ``layersample_``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from layersample.errors import ConfigError
from layersample.optim.by_identity import PLACEHOLDER, IdentityRecords, knows_places, settle_overrides
from layersample.optim.host_copies import wait_for_copies
from layersample.optim.masters import AT_REST, MASTER, REMAINDER, combine, follow, split
from layersample.optim.own_state import end_plain, fits, fresh_state, is_ours, makes_state_when_made, widened
from layersample.optim.packing import forget_begun, pack, parameters_of, unpack
from layersample.optim.slices import SlicedState, find_slices
from layersample.optim.step_hooks import warn_of_hooks
from layersample.optim.support import check_state
from layersample.optim.viewed import VIEWED, check_unviewed
from layersample.optim.zero_grads import ZeroGradHook
from layersample.projection.branches import Branch
from layersample.projection.low_rank import BASIS, LowRank, LowRankParameter
from layersample.projection.projection import Projection
from layersample.unwrapping import exact_values, is_dtensor, unwrap_optimizer

logger = logging.getLogger(__name__)


@dataclass
class _Replaced:
    """A parameter in whose place the optimizer steps on another.

    Args:
        parameter: The user's parameter.
        stand_in: What replaces it, with a gradient.
        kept: The part of the parameter's state that isn't the optimizer's own.
        group: The parameter's group.
        low_rank: The rest of the stand-in, where it has a low rank.
        rows: The rows that the stand-in is of; ``None`` for all.
        sliced: The optimizer's state of all rows, where those are some.
    """

    parameter: nn.Parameter
    stand_in: nn.Parameter
    kept: dict[str, Tensor]
    group: dict[str, Any]
    low_rank: LowRankParameter | None = None
    rows: slice | None = None
    sliced: SlicedState | None = None


class OptimizerView:
    """Makes an optimizer step on masters and low-rank parameters in place of the user's.

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper of one.
        projection: The low-rank projection; ``None`` for full rank.
        master_weights: Whether bf16 parameters have fp32 masters.
        seed: Seed of the projection's randomness.

    Raises:
        ConfigError: If the optimizer's weight decay can't be told apart from its update, masters are asked for of
            sharded parameters, or the optimizer has another view, which isn't closed.
    """

    def __init__(
        self, optimizer: Optimizer, *, projection: Projection | None, master_weights: bool, seed: int
    ) -> None:
        check_unviewed(optimizer)
        self._optimizer = unwrap_optimizer(optimizer)
        self._master_weights = master_weights
        self._low_rank = LowRank(self._optimizer, projection, seed) if projection is not None else None
        if any(is_dtensor(p) and self.has_master(p) for p in parameters_of(self._optimizer)):
            raise ConfigError(
                "Master weights of sharded bf16 parameters aren't kept: shard the model in float32 with "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16), whose shards are the masters, or choose "
                "master_weights=False, which loses small updates."
            )
        self._replaced: list[_Replaced] = []
        self._groups: list[dict[str, Any]] = []
        self._parameters: list[list[nn.Parameter]] = []
        self._skips = False
        self.lr_factors: Mapping[Tensor, float] = {}
        """By what the learning rate of some parameters is multiplied in a step; their group's stays what it is."""
        self._rows: slice | None = None  # of the parameter that is stepped now
        self._sliced: SlicedState | None = None
        # Of each parameter, what :func:`_writes` was when its master was last right.
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}
        end_plain(self._optimizer)
        unpack(self._optimizer)  # where the optimizer was loaded before, as in the Trainer
        settle_overrides(self._optimizer)
        self._known: set[Tensor] = set(parameters_of(self._optimizer))
        self._look_up_identities()
        self._eager = makes_state_when_made(self._optimizer)
        self._had_state: set[Tensor] | None = None  # before its first step
        self._first_step_is_over = self._said = self._named_hooks = False
        before = self._optimizer.register_step_pre_hook(self._before_step)
        after = self._optimizer.register_step_post_hook(self._after_step)
        self._step_hooks = before.id, after.id
        self._handles: list[RemovableHandle | ZeroGradHook] = [
            before,
            after,
            self._optimizer.register_state_dict_pre_hook(lambda _: self.restore()),
            self._optimizer.register_state_dict_post_hook(
                partial(pack, shards=False, has_master=self.has_master)
            ),
            self._optimizer.register_load_state_dict_pre_hook(
                partial(pack, shards=True, has_master=self.has_master)
            ),
            self._optimizer.register_load_state_dict_post_hook(self._loaded),
            # A loop that leaves out a batch whose step failed clears the user's gradients, not the stand-ins'.
            ZeroGradHook(self._optimizer, self.restore),
        ]
        VIEWED.add(self._optimizer)

    def close(self) -> None:
        """Leave the optimizer as it was found; its state stays. Safe to call twice, and once it has another view."""
        self.restore()
        if self._handles:
            VIEWED.discard(self._optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._versions.clear()

    def set_projected(
        self, parameters: Mapping[str, nn.Parameter], branches: Mapping[Tensor, Branch] | None = None
    ) -> None:
        """Have these parameters, by name, projected from now on, and no others; some get a part of their gradient."""
        if self._low_rank is not None:
            self._low_rank.names = {parameter: name for name, parameter in parameters.items()}
            self._low_rank.branches = dict(branches or {})
        if not self._named_hooks:
            replaces = self._low_rank is not None or any(map(self.has_master, parameters_of(self._optimizer)))
            self._named_hooks = replaces and warn_of_hooks(self._optimizer, *self._step_hooks)
        self._look_up_identities()

    def _look_up_identities(self) -> None:
        self._records = IdentityRecords(self._optimizer, parameters_of(self._optimizer))
        self._keeps_places = knows_places(self._optimizer)

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put away what frozen parameters hold: masters become remainders, and bases are forgotten."""
        frozen = list(parameters)
        self.put_masters_away(frozen)
        if self._low_rank is not None:
            for parameter in frozen:
                if state := self._optimizer.state.get(parameter):
                    self._low_rank.forget_basis(state)

    def put_masters_away(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make remainders of the masters that frozen parameters have."""
        for parameter in parameters:
            state = self._optimizer.state.get(parameter)
            if state and MASTER in state:
                master = state.pop(MASTER)
                state.update(split(master, exact_values(parameter).detach().to(master.device)))
                self._versions.pop(parameter, None)
        wait_for_copies()  # of remainders, which a checkpoint may read next

    def forget(self, *, of_branches: bool = False) -> None:
        """Drop all state but exact weights, of all parameters or of those with branches: it has other shapes."""
        some = self._low_rank.branches if of_branches and self._low_rank else self._optimizer.state
        for state in [state for parameter, state in self._optimizer.state.items() if parameter in some]:
            for key in [key for key in state if key != MASTER and key not in AT_REST]:
                del state[key]

    def has_master(self, parameter: Tensor) -> bool:
        """Whether a parameter trains on an fp32 master."""
        return self._master_weights and parameter.dtype == torch.bfloat16

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether a parameter's gradient is projected now."""
        return self._low_rank is not None and parameter in self._low_rank.names

    def slices(self, parameter: Tensor) -> Iterator[None]:
        """Have the steps that follow be of some rows of a parameter each, as many as this yields.

        One that is large and has a master is stepped slice by slice, where the optimizer treats each element by
        itself: the gradient in fp32 is then never whole. Any other one is stepped at once.

        Args:
            parameter: A parameter of the optimizer, the only one that the steps are of.
        """
        divides = self.has_master(parameter) and not self.is_projected(parameter)
        rows = find_slices(self._optimizer, parameter) if divides else []
        try:
            for self._rows in rows if len(rows) > 1 else (None,):
                yield
        finally:
            self._rows = self._sliced = None

    # A step

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
        parameters = parameters_of(optimizer)
        if self._had_state is None:
            self._had_state = {p for p, state in optimizer.state.items() if state}
            self._known.update(parameters)
        if self._eager:
            self._make_lacking_state(optimizer)
        replaces = any(self.is_projected(p) or self.has_master(p) for p in parameters)
        if not replaces and not any(parameter in self.lr_factors for parameter in parameters):
            return
        # GradScaler leaves it to a fused optimizer to undo the scale, and to skip a step that overflowed.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        self._skips = overflow is not None and bool(overflow)
        if self._low_rank is not None and not self._skips:
            self._low_rank.check_gradients(parameters)
        self._groups = list(optimizer.param_groups)
        self._parameters = [group["params"] for group in self._groups]
        try:
            self._enter_step(optimizer, scale)
        except BaseException:
            self.restore()
            raise

    def _make_lacking_state(self, optimizer: Optimizer) -> None:
        """Make the state that an optimizer's constructor makes, where freezing has dropped it."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                replaced = self.is_projected(parameter) or self.has_master(parameter)
                if parameter.grad is not None and not replaced and not optimizer.state.get(parameter):
                    optimizer.state[parameter] = fresh_state(optimizer, group, parameter)

    def _enter_step(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        if self._keeps_places and self.lr_factors:
            raise ConfigError(
                f"Layers can't have learning rates of their own under {type(optimizer).__name__}, which knows "
                "parameters by their place in a group: leave switch_warmup and lr_correction out."
            )
        for group in self._groups:
            parts: dict[tuple[float, bool], list[nn.Parameter]] = {}  # by factor, and whether of low rank
            for parameter in group["params"]:
                factor = self.lr_factors.get(parameter, 1.0)
                projected = parameter.grad is not None and self.is_projected(parameter)
                # Where an optimizer knows parameters by their place in the group, each keeps it.
                if self._keeps_places and (parameter.grad is None or projected):
                    parts.setdefault((1.0, False), []).append(PLACEHOLDER)
                if parameter.grad is None:
                    continue
                own = group if factor == 1.0 else {**group, "lr": group["lr"] * factor}
                stand_in = parameter
                if projected:
                    stand_in = self._make_low_rank(parameter, own, scale)
                elif self.has_master(parameter):
                    stand_in = self._make_master(parameter, own)
                parts.setdefault((factor, projected), []).append(stand_in)
            group["params"] = parts.pop((1.0, False), [])
            for (factor, projected), members in parts.items():
                rate = group["lr"] if factor == 1.0 else group["lr"] * factor
                # Weight decay of what has a low rank is that of the whole weight, which we apply.
                other = {"weight_decay": 0.0} if projected else {}
                optimizer.param_groups.append({**group, "params": members, "lr": rate, **other})

    def _make_master(self, parameter: nn.Parameter, group: dict[str, Any]) -> nn.Parameter:
        own, kept = self._split_state(parameter)
        assert parameter.grad is not None
        if self._rows is None:
            stand_in = nn.Parameter(kept[MASTER])
            stand_in.grad = parameter.grad.float()
            return self._replace(_Replaced(parameter, stand_in, kept, group), own)
        self._sliced = self._sliced or SlicedState(own, parameter.shape)
        stand_in = nn.Parameter(kept[MASTER][self._rows])
        stand_in.grad = parameter.grad[self._rows].float()
        replaced = _Replaced(parameter, stand_in, kept, group, rows=self._rows, sliced=self._sliced)
        return self._replace(replaced, self._sliced.begin(self._rows))

    def _make_low_rank(
        self, parameter: nn.Parameter, group: dict[str, Any], scale: Tensor | None
    ) -> nn.Parameter:
        assert self._low_rank is not None
        own, kept = self._split_state(parameter)
        weight = kept.get(MASTER, parameter.detach())
        if BASIS not in kept and own and self._is_of_full_rank(own, weight):
            own = {}
        low_rank = self._low_rank.begin(parameter, weight, group, own, kept, scale=scale, skips=self._skips)
        return self._replace(_Replaced(parameter, low_rank.parameter, kept, group, low_rank), own)

    def _is_of_full_rank(self, own: dict[str, Any], weight: Tensor) -> bool:
        """Whether state is from before the projection, whose shapes it can't fit."""
        assert self._low_rank is not None
        if fits(own, self._low_rank.shape_of(weight)) or not fits(own, weight.shape):
            return False
        if not self._said:
            self._said = True
            logger.warning(
                "The optimizer has state at full rank, of steps before the projection: that of projected weights "
                "begins afresh."
            )
        return True

    def _split_state(self, parameter: nn.Parameter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A parameter's state as the optimizer's own and ours; a master is made where one is due."""
        state = self._optimizer.state.get(parameter, {})
        kept = {key: value for key, value in state.items() if is_ours(key)}
        own = {key: value for key, value in state.items() if key not in kept}
        if self.has_master(parameter):
            if own and MASTER not in kept and REMAINDER not in kept:  # it is of steps without a master
                own = {} if self._eager and not int(own.get("step", 1)) else widened(own, parameter)
            # A look at every element would cost some percent of a step, and a write is seldom: torch counts them.
            if MASTER in kept and self._versions.get(parameter) != _writes(parameter):
                follow(kept[MASTER], parameter)
            kept[MASTER] = combine(parameter, kept)
            for key in AT_REST:
                kept.pop(key, None)
        return own, kept

    def _replace(self, replacement: _Replaced, own: dict[str, Any]) -> nn.Parameter:
        self._optimizer.state.pop(replacement.parameter, None)
        if not own and self._eager:
            own = fresh_state(self._optimizer, replacement.group, replacement.stand_in)
        if own:  # an empty entry would be taken for one that is set up
            self._optimizer.state[replacement.stand_in] = own
        self._records.lend(replacement.parameter, replacement.stand_in)
        self._replaced.append(replacement)
        return replacement.stand_in

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for replacement in self._replaced:
            if not self._skips:
                self._apply(replacement)
        self.restore()
        if not self._first_step_is_over and self._had_state is not None:
            check_state(optimizer, self._known, self._had_state)
            self._first_step_is_over = True

    def _apply(self, done: _Replaced) -> None:
        weight = done.kept.get(MASTER, done.parameter.detach())
        if done.low_rank is not None:
            assert self._low_rank is not None
            done.kept = self._low_rank.finish(done.low_rank, weight, done.group, done.kept)
        if MASTER in done.kept:
            rows = ... if done.rows is None else done.rows
            done.parameter.detach()[rows].copy_(weight[rows])
            self._versions[done.parameter] = _writes(done.parameter)

    def restore(self) -> None:
        """Put the user's parameters back, as every step does; after one that raised, its state as well."""
        for replacement in self._replaced:
            own = self._optimizer.state.pop(replacement.stand_in, {})
            self._records.take_back(replacement.stand_in)
            if replacement.sliced is not None and replacement.rows is not None:
                own = replacement.sliced.end(replacement.rows, own)
            if own or replacement.kept:
                self._optimizer.state[replacement.parameter] = {**own, **replacement.kept}
        for group, parameters in zip(self._groups, self._parameters, strict=True):
            group["params"] = parameters
        if self._groups:
            del self._optimizer.param_groups[len(self._groups) :]
        self._replaced, self._groups, self._parameters = [], [], []

    def _loaded(self, optimizer: Optimizer) -> None:
        self._versions.clear()
        forget_begun(optimizer)
        unpack(optimizer)


def _writes(parameter: nn.Parameter) -> tuple[int, int]:
    """How often a parameter has been written to, and where its values are: ``weight.data = other`` isn't counted."""
    return parameter._version, parameter.untyped_storage()._cdata
