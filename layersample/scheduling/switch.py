"""A switch of layers: which parameters require a gradient, and everything that depends on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from layersample.activations.gradient_checkpointing import TruncatedCheckpointing
from layersample.frozen.quantized import refuse_quantized
from layersample.frozen.weights import hold_frozen
from layersample.layers.find import ModelLayers
from layersample.layers.modules import is_inside
from layersample.layers.rules import Units, check_optimizer
from layersample.optim.frozen_state import create_policy
from layersample.optim.masters import MASTER, combine, follow
from layersample.optim.stand_ins import OptimizerView
from layersample.optim.step_in_backward import BackwardStepper, how_to_step
from layersample.parallel.base import Engine
from layersample.projection.projection import Projection
from layersample.projection.targets import find_targets
from layersample.sampling.statistics import GRADIENTS
from layersample.scheduling.gradient_norms import GradientNorms
from layersample.scheduling.gradient_watch import GradientWatch
from layersample.scheduling.options import SchedulerOptions
from layersample.scheduling.self_check import SelfCheck
from layersample.unwrapping import exact_values


class Switch:
    """Lets some layers of a model train, and freezes the others. All arguments mean what they do in LayerScheduler.

    Args:
        engine: What the model runs in.
        optimizer: Its optimizer.
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
        optimizer: Optimizer,
        model_layers: ModelLayers,
        units: Units,
        options: SchedulerOptions,
        projection: Projection | None,
        *,
        collects: Collection[str] = (),
    ) -> None:
        self._engine, self._model, self._optimizer = engine, engine.model, optimizer
        self._layers, self._units = model_layers, units
        refuse_quantized(self._model, model_layers)
        check_optimizer(self._model, optimizer, units)
        self._policy = create_policy(options.state)
        self.projected = find_targets(self._model, model_layers, projection)
        stepping = how_to_step(options.step_in_backward)
        if stepping is not None:
            engine.check_step_in_backward()
        if options.frozen_weights is not None:
            engine.check_frozen_weights()
        self.stepper: BackwardStepper | None = None
        self._self_check: SelfCheck | None = None
        with ExitStack() as made:  # or what is on the optimizer by then would work on with no one to end it
            if stepping is not None:
                # In front of the view: what the loop steps itself is clipped before it is projected.
                self.stepper = BackwardStepper(optimizer, stepping)
                made.callback(self.stepper.close)
            self.view = OptimizerView(
                optimizer,
                projection=projection,
                master_weights=options.master_weights,
                seed=options.seed or 0,
            )
            made.callback(self.view.close)
            self.frozen = hold_frozen(self._model, model_layers, options.frozen_weights)
            if self.frozen is not None:
                made.callback(self.frozen.close)
            if options.check:
                self._self_check = SelfCheck(optimizer, options.state)
                made.callback(self._self_check.close)
            # A tower that trains is one more stack, with an input that requires no gradient.
            always = [name for unit in units.always for name in unit.parameters]
            towers = sum(any(is_inside(name, tower) for name in always) for tower in model_layers.towers)
            self._checkpointing = TruncatedCheckpointing(self._model, model_layers.num_stacks + towers)
            made.callback(self._checkpointing.close)
            self.norms: GradientNorms | None = None
            if GRADIENTS in collects:
                self.norms = GradientNorms(optimizer, engine, in_backward=stepping is not None)
                made.callback(self.norms.close)
            self._watch = GradientWatch(optimizer)
            made.callback(self._watch.close)
            engine.prepare()
            made.pop_all()

    def apply(self, active: Sequence[int], round: int) -> None:
        """Freeze and unfreeze; parameters are looked up by name, since wrappers replace the objects.

        Args:
            active: Indices of the sampled layers that train from now on.
            round: Number of the period.
        """
        names = {name for own in self._units.training(active).values() for name in own}
        if self.frozen is not None:
            self.frozen.activate(names)
        training = {}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                training[name] = parameter
            else:
                parameter.grad = None  # a stale gradient would still update it, and a zero one decay it
        if self.frozen is not None:
            # What masters hold beyond their weights is found while the weights are there.
            self.view.put_masters_away(p for p in self._model.parameters() if not p.requires_grad)
            self.frozen.freeze(names)
        self.view.project({name: p for name, p in training.items() if name in self.projected})
        units = [self._units.sampled[i] for i in active]
        own = {unit.name: [training[n] for n in unit.parameters if n in training] for unit in units}
        if self.norms is not None:  # in front of what steps in backward, and frees gradients
            self.norms.begin(dict(zip(active, own.values(), strict=True)))
        if self.stepper is not None:
            self.stepper.watch(training.values())
        in_stack = [unit for unit in units if unit in self._layers.layers]
        self._checkpointing.switch({unit.name: self._model.get_submodule(unit.name) for unit in in_stack})
        sampled = {parameter for parameters in own.values() for parameter in parameters}
        self._watch.begin(own, [p for p in training.values() if p not in sampled])
        self._engine.switched([unit.name for unit in units], round)
        if self._self_check is not None:
            self._self_check.begin(dict(self._model.named_parameters()))

    def count_step(self) -> None:
        """One more optimizer step is done."""
        self._watch.count_step()
        if self.norms is not None:
            self.norms.end_step()

    def place_state(self) -> None:
        """Drop, keep or move the optimizer's state of what is frozen, and bring back that of what trains."""
        parameters = list(self._model.parameters())
        frozen = [p for p in parameters if not p.requires_grad]
        self.view.freeze(frozen)
        self._policy.freeze(self._optimizer, frozen)
        self._policy.activate(self._optimizer, [p for p in parameters if p.requires_grad])

    def check(self, active: Sequence[int]) -> None:
        """Check a period at its end, where that is asked for.

        Raises:
            SelfCheckError: If it fails.
        """
        if self._self_check is not None:
            self._self_check.end(dict(self._model.named_parameters()), self._units.training(active))

    def fp32_weights(self) -> dict[str, Tensor]:
        """The model's state in fp32: bf16 weights with what their masters hold beyond them.

        A weight that was changed behind its master, by whatever means, wins where the two disagree.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {
            name: self._exact(value, parameters.get(name))
            if value.dtype == torch.bfloat16
            else value.detach()
            for name, value in self._model.state_dict(keep_vars=True).items()
        }

    def trained_weights(self) -> dict[str, Tensor]:
        """The model's state but for what is still as in the file that it is mapped from, which isn't read."""
        frozen = {} if self.frozen is None else self.frozen.mapped
        parameters = dict(self._model.named_parameters())
        found = {name: exact_values(p).detach() for name, p in parameters.items() if name not in frozen}
        return found | {name: buffer.detach() for name, buffer in self._model.named_buffers()}

    def exact_weights(self) -> AbstractContextManager[None]:
        """Have the model show, and compute with, the exact values of frozen weights."""
        return nullcontext() if self.frozen is None else self.frozen.exact()

    def _exact(self, weight: Tensor, parameter: Tensor | None) -> Tensor:
        """A weight in fp32; the optimizer knows it by its parameter, which may be held rounded."""
        state = self._optimizer.state.get(parameter, {}) if parameter is not None else {}
        exact = combine(weight, state)
        return follow(exact.clone(), weight) if MASTER in state else exact

    def close(self) -> None:
        """Every parameter requires a gradient again as it did before. Safe to call twice."""
        if self._self_check is not None:
            self._self_check.close()
            self._self_check = None
        self._watch.close()
        if self.norms is not None:
            self.norms.close()
        if self.stepper is not None:
            self.stepper.close()
        self._checkpointing.close()
        self.view.close()
        parameters = dict(self._model.named_parameters())
        for name, trainable in self._units.trainable.items():
            parameters[name].requires_grad_(trainable)
        if self.frozen is not None:
            self.frozen.close()
        self._engine.close()
