"""LayerScheduler: every `period` optimizer steps, freeze what trained and let the sampler's next layers train."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from layersample.checkpointing import TruncatedCheckpointing
from layersample.engine import find_engine
from layersample.errors import ConfigError
from layersample.layers import GroupName, find_layers
from layersample.optimizer_state import StatePolicyName, create_policy
from layersample.registry import create_sampler
from layersample.sampler import LayerSampler, LayerStatistics, Measurement, SamplingContext
from layersample.selfcheck import SelfCheck
from layersample.units import Rule, arrange, check_optimizer

logger = logging.getLogger(__name__)

Batches = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
_STATE_VERSION = 1


class LayerScheduler:
    """Trains a few layers at a time, in any loop. Use it like a learning-rate scheduler.

    The first set of layers is active once the scheduler is made; :meth:`step`, called after each
    ``optimizer.step()``, draws the next one every ``period`` steps, before any of its gradients exist.
    Sampling flips ``requires_grad`` and edits ``optimizer.state``; ``param_groups`` stay as they are. So the
    optimizer must hold all parameters, and be made while they all require a gradient. A parameter that
    doesn't require one when the scheduler is made stays frozen.

    Args:
        model: The model, wrapped by DDP or sharded by FSDP already, if it will be. A tied weight counts once.
        optimizer: Any torch optimizer over the model's parameters, or accelerate's wrapper of one.
        sampler: Name of a registered sampler, or a sampler.
        num_active: Layers that train at a time (γ), between 1 and the number of layers.
        period: Optimizer steps between draws (K), at least 1.
        seed: Seed of the draws. They depend on it and on the period's number alone.
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
        batches: Calibration batches, for samplers that measure with data: mappings of the model's arguments,
            in an iterable that can be read more than once, or a function that gives one.
        state_dict: State of :meth:`state_dict` to continue from: as :meth:`load_state_dict`, but without
            measuring and drawing a first set in vain.
        check: Check at the end of each period, bit by bit, that frozen weights didn't change, active ones
            did, and nothing frozen holds a gradient or state. Costs one hash of all weights a period.

    Raises:
        ConfigError: If an argument is out of bounds or a name unknown; if the model has no layers, or layers
            without a trainable parameter; if the optimizer lacks sampled parameters.

    References:
        LISA, arXiv 2403.17919.

    Example:
        >>> scheduler = LayerScheduler(model, optimizer, "lisa", num_active=2, period=20)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step(); scheduler.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sampler: str | LayerSampler,
        *,
        num_active: int = 2,
        period: int = 20,
        seed: int = 0,
        sampler_options: Mapping[str, Any] | None = None,
        layers: str | Sequence[str | nn.Module] | None = None,
        embeddings: Rule = "train",
        head: Rule = "train",
        norm: Rule = "train",
        other: Rule = "train",
        state: StatePolicyName = "drop",
        batches: Batches | None = None,
        state_dict: Mapping[str, Any] | None = None,
        check: bool = False,
    ) -> None:
        if period < 1:
            raise ConfigError(f"period must be at least 1 optimizer step, but got period={period}.")
        if isinstance(sampler, str):
            self.sampler = create_sampler(sampler, sampler_options)
            self._sampler_name = sampler
        else:
            if sampler_options:
                raise ConfigError(
                    "sampler_options go with a sampler's name; give them to the sampler itself."
                )
            self.sampler = sampler
            self._sampler_name = type(sampler).__name__
        # As a checkpoint in JSON will give it back.
        self._options = json.loads(json.dumps(dict(sampler_options or {}), default=str))
        self._engine = find_engine(model, optimizer)
        self._model = self._engine.model
        self._optimizer = optimizer
        self.num_active, self.period, self.seed = num_active, period, seed
        try:
            self._policy = create_policy(state)
            self.model_layers = find_layers(self._model, layers)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        rules: dict[GroupName, Rule] = {"embeddings": embeddings, "head": head, "norm": norm, "other": other}
        self._units = arrange(self._model, self.model_layers, rules)
        if not 1 <= num_active <= len(self._units.sampled):
            raise ConfigError(
                f"num_active must be between 1 and the {len(self._units.sampled)} layers to sample from, "
                f"but got num_active={num_active}."
            )
        check_optimizer(self._model, optimizer, self._units)
        self._checkpointing = TruncatedCheckpointing(self._model, self.model_layers.num_stacks)
        self._self_check = SelfCheck(optimizer, state) if check else None
        self._state_is_placed, self._round, self._steps = False, 0, 0
        self._active: tuple[int, ...] = ()
        self._inclusion: Sequence[float] | None = None
        self._visits = [0] * len(self._units.sampled)
        self._last_active: list[int | None] = [None] * len(self._units.sampled)
        self._changed = set(range(len(self._units.sampled)))
        self._batches = batches if batches is None or callable(batches) else lambda: batches
        self._engine.prepare()
        if state_dict is None:
            self._start_round()
        else:
            self.load_state_dict(state_dict)

    # What is active

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all that is sampled, from the input to the output."""
        return tuple(unit.name for unit in self._units.sampled)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices into :attr:`layers` of those that train now, ascending."""
        return self._active

    @property
    def active_layers(self) -> tuple[str, ...]:
        """Names of the sampled layers that train now."""
        return tuple(self._units.sampled[i].name for i in self._active)

    @property
    def round(self) -> int:
        """Number of the current period, from 0."""
        return self._round

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self._steps

    @property
    def inclusion_probabilities(self) -> list[float] | None:
        """The chance that each of :attr:`layers` had to be active now, computed; ``None`` if not known."""
        return None if self._inclusion is None else list(self._inclusion)

    @property
    def coverage(self) -> float:
        """Share of :attr:`layers` that have trained so far, those that train now included."""
        return sum(visits > 0 or i in self._active for i, visits in enumerate(self._visits)) / len(
            self._visits
        )

    @property
    def staleness(self) -> list[int]:
        """Periods since each of :attr:`layers` last trained: 0 for those that train now."""
        last = [-1 if period is None else period for period in self._last_active]
        return [0 if i in self._active else self._round - period for i, period in enumerate(last)]

    # The run

    def step(self) -> None:
        """Count one optimizer step; at the end of a period, switch to the next set of layers.

        Call it after ``optimizer.step()``. Under accelerate's gradient accumulation a call in between two
        optimizer steps doesn't count.
        """
        gradient_state = getattr(self._optimizer, "gradient_state", None)
        if gradient_state is not None and not gradient_state.sync_gradients:
            return
        self.advance_to(self._steps + 1)

    def advance_to(self, steps: int) -> None:
        """Count optimizer steps up to a number, for a loop that keeps count itself.

        Args:
            steps: Optimizer steps done since training began; nothing happens if they are counted already.
        """
        while self._steps < steps:
            if not self._state_is_placed:
                # Not in the constructor: a checkpoint may have filled the optimizer before, and says only in
                # load_state_dict which layers its state belongs to.
                self._place_state()
            self._steps += 1
            if self._steps % self.period == 0:
                self._finish_round()
                self._round += 1
                self._start_round()
                self._place_state()

    def close(self) -> None:
        """End sampling: every parameter requires a gradient again as it did before. Safe to call twice.

        Raises:
            SelfCheckError: With ``check=True``, if the current period, cut short, fails its check.
        """
        self._check_round()
        self._release()

    def _release(self) -> None:
        if self._self_check is not None:
            self._self_check.close()
            self._self_check = None
        self._checkpointing.close()
        parameters = dict(self._model.named_parameters())
        for name, trainable in self._units.trainable.items():
            parameters[name].requires_grad_(trainable)
        self._engine.close()

    def __enter__(self) -> LayerScheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, of JSON types."""
        return {
            "version": _STATE_VERSION,
            **self._identity(),
            "round": self._round,
            "steps": self._steps,
            "active": list(self._active),
            "visits": list(self._visits),
            "last_active": list(self._last_active),
            "changed": sorted(self._changed),
            "inclusion": self.inclusion_probabilities,
            "sampler_state": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, in the middle of a period too.

        Load the model and the optimizer first.

        Raises:
            ConfigError: If the state is of another version, sampler, seed, period, number or list of layers.
        """
        for key, here in {"version": _STATE_VERSION, **self._identity()}.items():
            if state.get(key) != here:
                raise ConfigError(
                    f"A run must be resumed with the {key} it was begun with: it was {state.get(key)!r}, "
                    f"but is {here!r} now."
                )
        self.sampler.load_state_dict(state["sampler_state"])
        self._round, self._steps = state["round"], state["steps"]
        self._visits, self._last_active = list(state["visits"]), list(state["last_active"])
        self._changed, self._inclusion = set(state["changed"]), state["inclusion"]
        self._apply(tuple(state["active"]))
        self._place_state()
        self._begin_check()

    def _identity(self) -> dict[str, Any]:
        return {
            "sampler": self._sampler_name,
            "sampler_options": self._options,
            "num_active": self.num_active,
            "period": self.period,
            "seed": self.seed,
            "layers": list(self.layers),
        }

    # How it is done

    def _start_round(self) -> None:
        context = SamplingContext(
            layers=self.layers,
            num_active=self.num_active,
            round=self._round,
            step=self._steps,
            seed=self.seed,
            statistics=LayerStatistics(tuple(self._visits), tuple(self._last_active)),
            allow_empty=self._units.always_trains_something,
        )
        try:
            every = self.sampler.measure_every
            if self._round == 0 or (every is not None and self._round % every == 0):
                self._measure()
            self._inclusion = self.sampler.inclusion_probabilities(context)
            chosen = self._checked(list(self.sampler.sample(context)), context)
        except ValueError as error:
            raise ConfigError(f"Sampler {self._sampler_name}, period {self._round}: {error}") from error
        self._apply(chosen)
        self._begin_check()

    def _measure(self) -> None:
        if not self._engine.must_measure(self.sampler):
            return
        measurement = Measurement(
            model=self._model,
            model_layers=self.model_layers,
            layers=self.layers,
            num_active=self.num_active,
            changed=tuple(self.layers[i] for i in sorted(self._changed)),
            batches=self._batches,
        )
        self.sampler.measure(measurement)
        self._changed.clear()

    def _begin_check(self) -> None:
        if self._self_check is not None:
            self._self_check.begin(dict(self._model.named_parameters()))

    def _finish_round(self) -> None:
        for index in self._active:
            self._visits[index] += 1
            self._last_active[index] = self._round
        self._changed.update(self._active)
        self._check_round()

    def _check_round(self) -> None:
        if self._self_check is not None:
            self._self_check.end(dict(self._model.named_parameters()), self._units.training(self._active))

    def _checked(self, chosen: list[Any], context: SamplingContext) -> tuple[int, ...]:
        name = type(self.sampler).__name__
        if len(set(chosen)) != len(chosen) or not all(
            isinstance(i, int) and 0 <= i < context.num_layers for i in chosen
        ):
            raise ValueError(
                f"{name}.sample must return distinct integers from 0 to {context.num_layers - 1}, "
                f"but returned {chosen} in period {context.round}."
            )
        if not chosen and not context.allow_empty:
            raise ValueError(
                f"{name}.sample returned no layer in period {context.round}, and nothing else trains."
            )
        return tuple(sorted(chosen))

    def _apply(self, active: tuple[int, ...]) -> None:
        """Freeze and unfreeze; parameters are looked up by name, since wrappers replace the objects."""
        self._active = active
        training = {name for own in self._units.training(active).values() for name in own}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in training)
            if name not in training:
                parameter.grad = None  # a stale gradient would still update it, and a zero one decay it
        in_stack = [unit for i in active if (unit := self._units.sampled[i]) in self.model_layers.layers]
        self._checkpointing.switch(self._model.get_submodule(in_stack[0].name) if in_stack else None)
        self._engine.switched(self.active_layers, self._round)
        logger.debug("period %d from step %d: %s", self._round, self._steps, ", ".join(self.active_layers))

    def _place_state(self) -> None:
        parameters = list(self._model.parameters())
        self._policy.freeze(self._optimizer, [p for p in parameters if not p.requires_grad])
        self._policy.activate(self._optimizer, [p for p in parameters if p.requires_grad])
        self._state_is_placed = True
