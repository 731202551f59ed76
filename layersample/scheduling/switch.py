"""A switch of layers: which parameters require a gradient, and everything that depends on it."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.activations.gradient_checkpointing import TruncatedCheckpointing
from layersample.errors import ConfigError
from layersample.frozen.weights import hold_frozen
from layersample.layers.find import ModelLayers
from layersample.layers.rules import Units, check_optimizer, warn_of_shared
from layersample.optim.closures import run_closures_first
from layersample.optim.frozen_state import create_policy
from layersample.optim.inactive import InactiveStepper, moving_units
from layersample.optim.masters import at_rest
from layersample.optim.optimizers import Optimizers
from layersample.optim.own_state import end_plain, make_plain, plain_before_use
from layersample.optim.packing import unpack
from layersample.optim.stand_ins import OptimizerView
from layersample.optim.step_in_backward import BackwardStepper, how_to_step
from layersample.optim.support import WrapperWatch, check_supported, refuse_capture
from layersample.optim.viewed import check_unviewed, is_viewed
from layersample.optim.whole_state import needs_closure
from layersample.parallel.base import Engine
from layersample.projection.branches import branches_of
from layersample.projection.projection import Projection
from layersample.projection.targets import find_targets
from layersample.sampling.full_rank import FullRank
from layersample.sampling.statistics import GRADIENTS, WEIGHTS
from layersample.scheduling.gradient_norms import GradientNorms
from layersample.scheduling.gradient_watch import GradientWatch
from layersample.scheduling.options import SchedulerOptions
from layersample.scheduling.outside_changes import OutsideChanges
from layersample.scheduling.self_check import SelfCheck
from layersample.scheduling.weight_changes import WeightChanges
from layersample.scheduling.weights import ExactWeights
from layersample.scheduling.whole_states import WholeStates

logger = logging.getLogger(__name__)

# The switch that works on each optimizer, without keeping either in memory.
_switches: WeakKeyDictionary[Optimizer, weakref.ref[Switch]] = WeakKeyDictionary()


class Switch:
    """Lets some layers of a model train, and freezes the others. All arguments mean what they do in LayerScheduler.

    Args:
        engine: What the model runs in.
        optimizers: Its optimizer, or optimizers.
        model_layers: The model's layers.
        units: What is sampled of them, and what always trains.
        options: The scheduler's options.
        projection: The low-rank projection that they name, if any.
        collects: Statistics that the sampler asks for.

    Raises:
        ConfigError: If the optimizer can't train the model this way.
    """

    def __init__(
        self,
        engine: Engine,
        optimizers: Optimizers,
        model_layers: ModelLayers,
        units: Units,
        options: SchedulerOptions,
        projection: Projection | None,
        *,
        collects: Collection[str] = (),
    ) -> None:
        self._engine, self._model, self._optimizers = engine, engine.model, optimizers
        self._layers, self._units = model_layers, units
        check_optimizer(self._model, optimizers.param_groups, units)
        masters = options.master_weights and any(p.dtype == torch.bfloat16 for p in self._model.parameters())
        own_rates = options.switch_warmup > 0 or options.lr_correction is not None
        check_supported(
            optimizers,
            offloads=options.state == "offload",
            replaces=masters or projection is not None or own_rates,
        )
        asked = {"master_weights=False": masters, "a sampler that reads no gradients": GRADIENTS in collects}
        self._policy = create_policy(options.state)
        self.projected = find_targets(self._model, model_layers, projection)
        stepping = how_to_step(options.step_in_backward)
        if stepping is not None:
            engine.check_step_in_backward()
        if options.frozen_weights is not None:
            engine.check_frozen_weights()
        if options.inactive != "freeze":
            engine.check_step_in_backward(f"inactive={options.inactive!r}")
        self.stepper: BackwardStepper | None = None
        self._inactive: InactiveStepper | None = None
        self._rule, self._scope = options.inactive, options.inactive_scope
        self.moving: tuple[int, ...] = ()
        """Indices of the sampled layers that move though they aren't active."""
        self.moving_parameters: frozenset[str] = frozenset()
        self._self_check: SelfCheck | None = None
        self._closed = False
        self._moving: set[Tensor] = set()
        self._outside = OutsideChanges(optimizers)
        self._active_parameters: dict[int, list[nn.Parameter]] = {}
        self.lr_factors: dict[int, float] = {}
        """What the learning rates of active layers are multiplied by, by index."""
        with ExitStack() as made:  # or what is on the optimizer by then would work on with no one to end it
            self.whole_states = WholeStates(optimizers, options, asked)
            made.callback(self.whole_states.close)
            for each in optimizers.each:
                # In front of all else, which needs the gradients that a closure computes.
                if not needs_closure(each):
                    made.callback(run_closures_first(each).remove)
                made.callback(each.register_step_pre_hook(refuse_capture).remove)
            if stepping is not None:
                # In front of the views: what the loop steps itself is clipped before it is projected.
                self.stepper = BackwardStepper(optimizers, stepping)
                made.callback(self.stepper.close)
            if options.inactive != "freeze":
                self._inactive = InactiveStepper(
                    optimizers,
                    options.inactive,
                    lr_scale=options.inactive_lr_scale,
                    master_weights=options.master_weights,
                )
                made.callback(self._inactive.close)
            self._watches = [WrapperWatch(wrapper, inner) for wrapper, inner in optimizers.beside]
            for watch in self._watches:
                made.callback(watch.close)
            self._views: list[OptimizerView] = []
            for each in optimizers.each:
                view = OptimizerView(
                    each,
                    projection=projection,
                    master_weights=options.master_weights,
                    seed=options.seed or 0,
                )
                made.callback(view.close)
                self._views.append(view)
                if self.stepper is not None:
                    self.stepper.slices[each] = view.slices
            self.frozen = hold_frozen(self._model, model_layers, options.frozen_weights, masters=masters)
            if self.frozen is not None:
                made.callback(self.frozen.close)
            self.weights = ExactWeights(self._model, optimizers, self.frozen)
            if options.check:
                self._self_check = SelfCheck(optimizers, options.state)
                made.callback(self._self_check.close)
            self._checkpointing = TruncatedCheckpointing(self._model)
            made.callback(self._checkpointing.close)
            self.norms: GradientNorms | None = None
            if GRADIENTS in collects:
                self.norms = GradientNorms(optimizers, engine, in_backward=stepping is not None)
                made.callback(self.norms.close)
            watched = closing(WeightChanges(optimizers, engine)) if WEIGHTS in collects else nullcontext()
            self.changes = made.enter_context(watched)
            self._watch = GradientWatch(optimizers)
            made.callback(self._watch.close)
            self.check_order = self._watch.check_order  # of a loop's steps
            engine.prepare()
            self._made = made.pop_all()
        warn_of_shared(self._model, model_layers, units)
        for each in optimizers.each:
            _switches[each] = weakref.ref(self)

    def apply(self, active: Sequence[int], round: int, full_rank: FullRank | None = None) -> None:
        """Freeze and unfreeze; parameters are looked up by name, since wrappers replace the objects.

        Args:
            active: Indices of the sampled layers that train from now on.
            round: Number of the period.
            full_rank: Layers that get what the projection leaves out, where there are such.

        Raises:
            ConfigError: If it is closed, or a layer isn't in the model any more.
        """
        self.check_open()
        names = {name for own in self._units.training(active).values() for name in own}
        self._choose_moving(active, names)
        if self.frozen is not None:
            self.frozen.activate(names)
        training, moving, later = {}, [], []
        for name, parameter in self._model.named_parameters():
            if name not in self._units.trainable:
                later.append(name)
                continue
            parameter.requires_grad_(name in names or name in self.moving_parameters)
            if name in names:
                training[name] = parameter
                continue
            parameter.grad = None  # a stale gradient would still update it, and a zero one decay it
            if name in self.moving_parameters:
                moving.append(parameter)
        for view in self._views:
            view.restore()  # a step may have failed
        self._outside.check_parameters(names, training, later)
        if self.frozen is not None:
            # What masters hold beyond their weights is found while the weights are there.
            for view in self._views:
                view.put_masters_away(p for p in self._model.parameters() if not p.requires_grad)
            self.frozen.freeze(names)
        units = [self._units.sampled[i] for i in active]
        projected = {name: p for name, p in training.items() if name in self.projected}
        branches = branches_of(projected, dict(zip(active, units, strict=True)), full_rank)
        for view in self._views:
            view.set_projected(projected, branches)
        own = {unit.name: [training[n] for n in unit.parameters if n in training] for unit in units}
        by_index = dict(zip(active, own.values(), strict=True))
        self._active_parameters = by_index
        self.set_lr_factors({})  # those of the period before are of other layers
        if self.norms is not None:  # in front of what steps in backward, and frees gradients
            self.norms.begin(by_index)
        if self.changes is not None:
            self.changes.begin(by_index)
        if self.stepper is not None:
            self.stepper.watch(training.values())
        if self._inactive is not None:
            self._inactive.watch(moving)
        self.prepare_checkpointing(sorted({*active, *self.moving}))
        sampled = {parameter for parameters in own.values() for parameter in parameters}
        self._watch.begin(own, [p for p in training.values() if p not in sampled])
        self._moving = set(moving)
        self._outside.begin({n: p for n, p in self._model.named_parameters() if n in self._units.trainable})
        self._engine.switched([unit.name for unit in units], round)
        if self._self_check is not None:
            self._self_check.begin(dict(self._model.named_parameters()))

    def prepare_checkpointing(self, indices: Sequence[int]) -> None:
        """Have gradient checkpointing pass gradients down to the lowest of some sampled layers, and no further."""
        in_stack = self._units.layers_of(indices, self._layers)
        self._checkpointing.switch({name: self._model.get_submodule(name) for name in in_stack})

    def _choose_moving(self, active: Sequence[int], training: Collection[str]) -> None:
        sampled = self._units.sampled
        self.moving = tuple(moving_units(len(sampled), active, self._rule, self._scope))
        names = {name for i in self.moving for name in sampled[i].parameters if self._units.trainable[name]}
        self.moving_parameters = frozenset(names.difference(training))

    def count_step(self) -> None:
        """One more optimizer step is done."""
        self._watch.count_step()
        if self._inactive is not None:
            self._inactive.end_step()
        self._outside.look()
        if self.stepper is not None:
            self.stepper.end_step()
        if self.norms is not None:
            self.norms.end_step()

    def set_lr_factors(self, factors: Mapping[int, float]) -> None:
        """Have active layers step at other learning rates than their groups' from now on.

        Args:
            factors: What their learning rates are multiplied by, by the layer's index; a layer that isn't named has
                its group's.
        """
        self.lr_factors = dict(factors)
        by_parameter: dict[Tensor, float] = {
            p: factor for index, factor in factors.items() for p in self._active_parameters[index]
        }
        for view in self._views:
            view.lr_factors = by_parameter

    def place_state(self) -> None:
        """Drop, keep or move the optimizer's state of what is frozen, and bring back that of what trains."""
        parameters = list(self._model.parameters())
        training = [p for p in parameters if p.requires_grad and p not in self._moving]
        frozen = [p for p in parameters if not p.requires_grad or p in self._moving]
        for view in self._views:
            view.freeze(frozen)
        for each in (*self._optimizers.each, *(wrapper for wrapper, _ in self._optimizers.beside)):
            self._policy.freeze(each, frozen)
            self._policy.activate(each, training)
        for watch in self._watches:
            watch.switched()
        if self._self_check is not None:
            self._self_check.settle(dict(self._model.named_parameters()))

    def forget_state(self, *, of_branches: bool = False) -> None:
        """Drop all state but exact weights: of another projection, or another branch, it has other shapes."""
        for view in self._views:
            view.forget(of_branches=of_branches)

    def check_open(self) -> None:
        """Make sure that it still switches layers.

        Raises:
            ConfigError: If it is closed.
        """
        if self._closed:
            raise ConfigError(
                "A LayerScheduler must be open, but this one is closed: by close(), at the end of its with block, or "
                "by another that took its place on the same optimizer: make a new one to sample on."
            )

    def check(self, active: Sequence[int]) -> None:
        """Check a period at its end, where that is asked for.

        Raises:
            SelfCheckError: If it fails.
        """
        if self._self_check is not None:
            self._self_check.end(
                dict(self._model.named_parameters()),
                self._units.training(active),
                moving=self.moving_parameters,
            )

    def close(self, *, plain: bool = True) -> None:
        """Every parameter requires a gradient again as it did before. Safe to call twice.

        Args:
            plain: Whether the optimizer is left with state that it can step on by itself; otherwise with all it has,
                for another scheduler.
        """
        if self._closed:
            return
        self._closed = True
        self._self_check = None
        self._made.close()
        for each in self._optimizers.each if plain else ():
            end_plain(each)
            plain_before_use(each, self._leave_plain)
        parameters = dict(self._model.named_parameters())
        for name, trainable in self._units.trainable.items():
            if name in parameters:
                parameters[name].requires_grad_(trainable)
        if self.frozen is not None:
            self.frozen.close()
        self._engine.close()

    def _leave_plain(self) -> None:
        """Leave no state in the optimizer but its own, at full size; what makes bf16 weights exact stays here."""
        for each in self._optimizers.each:
            unpack(each)
        parameters = dict(self._model.named_parameters())
        for each in self._optimizers.each:
            for parameter, held in list(each.state.items()):
                each.state[parameter] = dict(held)  # a checkpoint in memory may hold the other
        for view in self._views:
            view.freeze(parameters.values())
        for parameter in parameters.values():
            kept = at_rest(self._optimizers.state_of(parameter))
            if kept:
                self.weights.at_rest[parameter] = kept
        projected = {parameters[name] for name in self.projected if name in parameters}
        for each in self._optimizers.each:
            self._policy.activate(each, parameters.values())
            make_plain(each, projected)


def take_over(optimizers: Optimizers) -> None:
    """Make sure that no other scheduler works on some optimizers.

    One that nothing refers to any more lets go of them. In an interactive session, where a cell that makes a
    scheduler is run again, the earlier one is closed.

    Raises:
        ConfigError: If another does, and isn't closed.
    """
    for each in optimizers.each:
        if each in _switches and is_viewed(each):
            gc.collect()  # it may be part of a circle that nothing else refers to
        earlier = _switches[each]() if each in _switches else None
        if earlier is not None and not earlier._closed and hasattr(sys, "ps1"):
            logger.warning(
                "The earlier LayerScheduler of this optimizer is closed: the new one takes its place."
            )
            earlier.close()
        check_unviewed(each)
