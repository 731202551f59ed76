"""LayerScheduler: every `period` optimizer steps, freeze what trained and let the sampler's next layers train."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.choices import Granularity, Inactive, InactiveScope, Rule, StatePolicyName
from layersample.frozen.formats import FrozenFormat
from layersample.frozen.quantized import refuse_quantized, save_plainly
from layersample.layers.costs import count_elements, layer_costs
from layersample.layers.find import find_layers
from layersample.layers.groups import GROUPS, GroupName
from layersample.layers.rules import arrange, warn_of_towers
from layersample.layers.unchanged import unchanged
from layersample.notices import warn_once
from layersample.optim.optimizers import Optimizers
from layersample.optim.step_in_backward import StepInBackward
from layersample.option_files import make_options
from layersample.parallel.agreement import mean_over_ranks
from layersample.parallel.find import find_engine
from layersample.projection.branches import check_branches
from layersample.projection.projection import Projection
from layersample.registry import PROJECTIONS, SAMPLERS
from layersample.sampling.answers import ask_to_end, draw, find_full_rank, find_inclusion
from layersample.sampling.calibration import Batches, reader_of
from layersample.sampling.draw_size import find_draw_size
from layersample.sampling.faults import naming
from layersample.sampling.history import LayerHistory
from layersample.sampling.reuse import observe, warn_of_learned
from layersample.sampling.sampler import (
    LayerSampler,
    Measurement,
    SamplingContext,
    check_collects,
)
from layersample.scheduling.exact_weights import SeesExactWeights
from layersample.scheduling.identity import RunIdentity
from layersample.scheduling.options import (
    DEFAULT_SAMPLER,
    SchedulerOptions,
    StepCount,
    default_period,
)
from layersample.scheduling.probing import Probes
from layersample.scheduling.resuming import Resumes
from layersample.scheduling.switch import Switch, take_over

logger = logging.getLogger(__name__)


class LayerScheduler(SeesExactWeights, Resumes, Probes):
    """Trains a few layers at a time, in any loop. Use it like a learning-rate scheduler.

    The first set of layers is active once the scheduler is made; :meth:`step`, called after each
    ``optimizer.step()``, draws the next one every ``period`` steps, before any of its gradients exist.
    Sampling flips ``requires_grad`` and edits ``optimizer.state``; ``param_groups`` stay as they are. So the
    optimizer must hold all parameters, and be made while they all require a gradient. A parameter that
    doesn't require one when the scheduler is made stays frozen.

    Args:
        model: The model, wrapped by DDP or sharded by FSDP already, if it will be. A tied weight counts once.
        optimizer: Any torch optimizer over the model's parameters, a wrapper of one (accelerate's), or a list of
            optimizers that share them, such as ``[muon, adamw]``; the loop steps each, then the scheduler.
        sampler: Name of a registered sampler, or a sampler.
        num_active: Layers that train at a time (γ), between 1 and the number of layers.
        granularity: What is sampled as one, and counted by ``num_active``: ``"layer"``, whole layers; ``"block"``,
            the attention and the MLP of each; ``"module"``, each module that owns a matrix, such as a linear one;
            ``"tensor"``, each parameter. All that is said of layers then holds for these.
        draw_budget: In place of ``num_active``: the most that what is drawn may hold. Bytes of weights, such as
            ``"500MB"``, or a part of all parameters, such as ``"3%"`` or ``0.03``. What always trains doesn't count.
        period: Optimizer steps between draws (K), at least 1; 20 by default.
        seed: Seed of the draws, from 0 to 2**32 - 1; 0 by default. They depend on it and on the period's number alone.
        sampler_options: Options of a sampler given by name.
        layers: Where the layers are, if they can't be found: see :func:`layersample.find_layers`.
        embeddings: What happens to the embeddings: ``"train"`` always, as LISA does; ``"freeze"`` always;
            ``"sample"`` them as one more layer. A tied head is the same weight: the stricter rule of the two
            (freeze, then sample) holds for it.
        head: The same for the output head.
        norm: The same for the final norm.
        other: The same for every parameter outside of these and the layers.
        state: Optimizer state of frozen layers: ``"drop"`` frees it, ``"keep"`` leaves it, ``"offload"``
            moves it to CPU memory until the layer trains again.
        projection: Name of a registered projection, or a projection: the gradients of active matrices are
            projected to a low rank, in which the optimizer keeps its state. ``None`` trains at full rank.
        projection_options: Options of a projection given by name: rank, scale, update_gap, targets, ...
        master_weights: Whether bf16 weights train on fp32 masters, so that no update is lost in rounding. While a
            layer is frozen, what its weights lack of fp32 (2 bytes a parameter) is kept in CPU memory. A weight
            that is changed between steps (``load_state_dict``, a clamp, an average swapped in) wins over its master.
            But torch keeps no count of what is written through ``.data``: where the layer trains, a step undoes it.
        step_in_backward: Update each parameter in the backward pass, as soon as its gradient is whole, and free the
            gradient; the loop's ``optimizer.step()`` then finds nothing left to do. ``True`` is ``StepInBackward()``;
            ``False`` leaves it to the loop.
        frozen_weights: Format in which the device holds the matrices of frozen layers: ``"int8"``, ``"nf4"`` or one
            of your own. Exact values wait in the host's memory, or in the file that the model was loaded from.
        inactive: What layers do that aren't active: ``"freeze"``, or ``"sgd"`` and ``"signsgd"``, a step without
            state in the backward pass, after which their gradient is freed (BREAD). It isn't clipped.
        inactive_lr_scale: Learning rate of that step, relative to that of the parameter's group.
        inactive_scope: Which layers take it: ``"all"``, or those ``"above"`` the lowest active one.
        switch_warmup: Optimizer steps over which the learning rate of layers that have just become active rises to
            that of their group; 0 is none. The first period has none. ``param_groups`` stay as they are.
        lr_correction: Multiply the learning rate of an active layer by the mean inclusion probability over its own,
            so that seldom drawn layers move as far as others; at most by this number. ``None`` doesn't.
        batches: Calibration batches, for samplers that measure with data: mappings of the model's arguments,
            in an iterable that can be read more than once, or a function that gives one.
        state_dict: State of :meth:`state_dict` to continue from: as :meth:`load_state_dict`, but without
            measuring the model and drawing a first set that isn't used.
        allow_changes: Whether a state of other options, on which draws and updates depend, may
            be loaded. Layers that are active stay so until their period ends.
        check: Check at the end of each period, bit by bit, that frozen weights didn't change, active ones
            did, and nothing frozen holds a gradient or state. Costs one hash of all weights a period.

    Raises:
        ConfigError: If an argument is out of bounds or a name unknown; if the model has no layers, or layers
            without a trainable parameter; if the optimizer lacks sampled parameters, or has another
            ``LayerScheduler`` that isn't closed. Nothing then stays on the model or the optimizer.

    References:
        LISA, arXiv 2403.17919; BREAD, OpenReview DBybUx7ARy.

    Example:
        >>> scheduler = LayerScheduler(model, optimizer, "lisa", num_active=2, period=20)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step(); scheduler.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        sampler: str | LayerSampler = DEFAULT_SAMPLER,
        *,
        num_active: int = 2,
        granularity: Granularity = "layer",
        draw_budget: str | float | None = None,
        period: int | None = None,
        seed: int | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        layers: str | Sequence[str | nn.Module] | None = None,
        embeddings: Rule = "train",
        head: Rule = "train",
        norm: Rule = "train",
        other: Rule = "train",
        state: StatePolicyName = "drop",
        projection: str | Projection | None = None,
        projection_options: Mapping[str, Any] | None = None,
        master_weights: bool = True,
        step_in_backward: StepInBackward | bool | None = False,
        frozen_weights: str | FrozenFormat | None = None,
        inactive: Inactive = "freeze",
        inactive_lr_scale: float = 5.0,
        inactive_scope: InactiveScope = "all",
        switch_warmup: int = 0,
        lr_correction: float | None = None,
        batches: Batches | None = None,
        state_dict: Mapping[str, Any] | None = None,
        allow_changes: bool = False,
        check: bool = False,
    ) -> None:
        # Every argument but the objects is an option; named once above, for editors, and once in SchedulerOptions.
        given = {name: value for name, value in locals().items() if name in SchedulerOptions.model_fields}
        self.options = options = make_options(SchedulerOptions, [("", given)], "option")
        self.sampler, self._sampler_name = SAMPLERS.resolve(sampler, sampler_options)
        self.projection: Projection | None
        self.projection, projection_name = PROJECTIONS.resolve_optional(projection, projection_options)
        give_batches = reader_of(batches)
        engine = find_engine(model, optimizer)
        if self.sampler.needs_projection:
            check_branches(self.projection, self._sampler_name)
            engine.check_branches()
        self._optimizers = Optimizers(optimizer)
        take_over(self._optimizers)  # before its frozen layers are taken for the user's
        self._engine, self._model = engine, engine.model
        self.seed = options.seed or 0
        self.period = options.period or default_period()
        self.model_layers = find_layers(self._model, layers)
        refuse_quantized(self._model, self.model_layers)  # before it is asked to unfreeze what can't train
        save_plainly(self._model)
        rules: dict[GroupName, Rule] = {name: getattr(options, name) for name in GROUPS}
        everything = self.sampler.trains_everything
        units = arrange(
            self._model, self.model_layers, rules, granularity=options.granularity, train_towers=everything
        )
        if options.draw_budget is not None:
            engine.check_sizes()
        size = find_draw_size(
            self._model, units, self.sampler, num_active=options.num_active, draw_budget=options.draw_budget
        )
        self._units, self.num_active, self._budget = size.units, size.num_active, size.budget
        if size.note:
            warn_once(logger, self._model, "%s", size.note)
        self._costs = layer_costs(self._model, self._units)
        collects = check_collects(self.sampler)
        self._switch = Switch(
            engine,
            self._optimizers,
            self.model_layers,
            self._units,
            options,
            self.projection,
            collects=collects,
        )
        warn_of_towers(self._model, self.model_layers, self._units)
        self._state_is_placed, self._round, self._steps, self._began = False, 0, 0, 0
        self._active: tuple[int, ...] = ()
        self._entered: tuple[int, ...] = ()  # those that weren't active in the period before
        self._inclusion: Sequence[float] | None = None
        self._history = LayerHistory(
            len(self.layers),
            collects=collects,
            names=self.layers,
            sizes=count_elements(self._model, self._units),
        )
        self._batches = give_batches
        self._identity = RunIdentity(
            options,
            sampler=self._sampler_name,
            projection=projection_name,
            frozen_weights=None if self.frozen is None else self.frozen.format,
            period=self.period,
            layers=self.layers,
        )
        try:
            if state_dict is None:
                warn_of_learned(self.sampler)
                self._start_round()
            else:
                self.load_state_dict(state_dict)
        except BaseException:
            self._switch.close(plain=False)  # another try must find the optimizer as this one did
            raise
        weakref.finalize(self, self._switch.close).atexit = False  # what nothing refers to any more lets go

    def step(self, *, loss: float | Tensor | None = None) -> None:
        """Count one optimizer step; at the end of a period, switch to the next set of layers.

        Call it after ``optimizer.step()``. Under accelerate's gradient accumulation a call in between two
        optimizer steps doesn't count.

        Args:
            loss: The step's training loss, for samplers that learn from it; on every rank, or on none.

        Raises:
            ConfigError: If no optimizer has stepped since it was last called, and there are gradients, finite ones.
        """
        if self._optimizers.waits:
            return
        self._switch.check_order()
        if loss is not None:
            self.tell_loss(loss)
        self.advance_to(self._steps + 1)

    def tell_loss(self, loss: float | Tensor) -> None:
        """Tell the training loss of the step that is counted next; where the sampler doesn't ask, nothing happens.

        Args:
            loss: The loss, on every rank; their mean counts.
        """
        if self._history.losses is not None:
            own = float(loss.detach() if isinstance(loss, Tensor) else loss)
            mean = mean_over_ranks(own, device=self._engine.device)
            self._history.losses.add(self._steps - self._began, mean)

    def advance_to(self, steps: int) -> None:
        """Count optimizer steps up to a number, for a loop that keeps count itself.

        Args:
            steps: Optimizer steps done since training began; nothing happens if they are counted already.
        """
        if type(steps) is not int:
            steps = make_options(StepCount, [("", {"steps": steps})], "argument").steps
        # Or steps of before sampling are caught up with, of which nothing is known.
        trained = steps == self._steps + 1
        while self._steps < steps:
            self._switch.check_open()
            if not self._state_is_placed:
                # Not in the constructor: which layers a checkpoint's state belongs to shows in load_state_dict.
                self._switch.place_state()
                self._state_is_placed = True
            self._steps += 1
            self._switch.count_step()
            self._set_learning_rates()
            due = self._steps - self._began >= self.period
            if trained and not due and self.sampler.watches_steps:
                with naming(self.sampler, self._sampler_name, self._round):
                    wanted = ask_to_end(self.sampler, self.statistics, self._context(self._active))
                due = self._engine.agree(wanted, f"whether period {self._round} ends at step {self._steps}")
            if due:
                self._end_round(observed=trained)

    def _end_round(self, *, observed: bool) -> None:
        self._history.record(self._round, self._active, moved=self._switch.moving)
        self._switch.check(self._active)
        if self._switch.changes is not None:
            self._history.record_changes(self._switch.changes.end())
        if observed:
            with naming(self.sampler, self._sampler_name, self._round):
                observe(self.sampler, self.statistics, self._context(self._active))
        self._history.end_period()
        self._round, self._began = self._round + 1, self._steps
        self._start_round()
        self._switch.whole_states.switched()
        self._switch.place_state()

    def close(self, *, check: bool = True) -> None:
        """End sampling: every parameter requires a gradient again as it did before. Safe to call twice.

        Args:
            check: Whether a self-check looks at the current period, cut short; not where a step was interrupted.

        Raises:
            SelfCheckError: If that check fails.
        """
        if check:
            self._switch.check(self._active)
        self._switch.close()

    def __enter__(self) -> LayerScheduler:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(check=error is None)

    def _context(self, active: tuple[int, ...] = ()) -> SamplingContext:
        return SamplingContext(
            layers=self.layers,
            num_active=self.num_active,
            round=self._round,
            step=self._steps,
            seed=self.seed,
            statistics=self.statistics,
            allow_empty=self._units.always_trains_something,
            costs=self._costs,
            active=active,
            budget=self._budget,
            inclusion=tuple(self._inclusion) if active and self._inclusion is not None else None,
        )

    def _start_round(self) -> None:
        with naming(self.sampler, self._sampler_name, self._round):
            every = self.sampler.measure_every
            if self._round == 0 or (every is not None and self._round % every == 0):
                self._measure()
            if self._round == 0 and self.sampler.probe_batches:
                self._probe(self.sampler.probe_batches)
            context = self._context()
            self._inclusion = find_inclusion(self.sampler, context)
            earlier, self._active = self._active, draw(self.sampler, context)
            full_rank = find_full_rank(self.sampler, context)
        self._entered = tuple(i for i in self._active if i not in earlier) if self._round else ()
        logger.debug("period %d from step %d: %s", self._round, self._steps, ", ".join(self.active_layers))
        self._switch.apply(self._active, self._round, full_rank)
        if full_rank is not None:
            self._switch.forget_state(of_branches=True)
        with naming(self.sampler, self._sampler_name, self._round):
            self._set_learning_rates()

    def _measure(self) -> None:
        if not (self._engine.must_measure(self.sampler) and self.sampler.measures):
            return
        measurement = Measurement(
            model=self._model,
            model_layers=self._units.parts_of(self.model_layers),
            layers=self.layers,
            num_active=self.num_active,
            changed=tuple(self.layers[i] for i in sorted(self._history.changed)),
            batches=self._batches,
            round=self._round,
            seed=self.seed,
        )
        with self._switch.weights.shown(), unchanged(self._model, only_after_errors=True):
            self.sampler.measure(measurement)
        self._history.changed.clear()
