"""What a checkpoint holds of a scheduler, and how a run goes on from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from layersample.errors import ConfigError
from layersample.projection.projection import Projection
from layersample.sampling.answers import find_full_rank
from layersample.sampling.faults import naming
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.scheduling.identity import RunIdentity
from layersample.scheduling.lr_factors import SetsLearningRates


class Resumes(SetsLearningRates):
    """The part of a scheduler that is saved and loaded."""

    sampler: LayerSampler
    projection: Projection | None
    period: int
    _identity: RunIdentity
    _sampler_name: str
    _state_is_placed: bool

    @abstractmethod
    def _measure(self) -> None:
        """Have the sampler measure the model."""

    @abstractmethod
    def _context(self, active: tuple[int, ...] = ()) -> SamplingContext:
        """What the sampler may look at now."""

    def __reduce__(self) -> Any:
        """Refuse to be copied or pickled: hooks on the optimizer and the model wouldn't come along.

        Raises:
            ConfigError: Always; it says what to do.
        """
        raise ConfigError(
            "A LayerScheduler can't be copied or pickled, because its hooks on the optimizer and the model wouldn't "
            "come along: save state_dict(), and make a new one on the copies, LayerScheduler(..., state_dict=state)."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, of JSON types."""
        _ = self.statistics  # what is still on the device becomes part of the history
        return {
            **self._identity.state_dict(),
            "round": self._round,
            "steps": self._steps,
            "began": self._began,
            "active": list(self._active),
            "entered": list(self._entered),
            **self._history.state_dict(),
            "inclusion": self.inclusion_probabilities,
            # Whoever loads sharded state must know which of it has a low rank; shapes alone don't tell.
            "projected": None
            if self.projection is None
            else {"rank": self.projection.rank, "names": sorted(self.projected)},
            "branches": self.sampler.needs_projection,
            "backward": None if self._switch.stepper is None else self._switch.stepper.state_dict(),
            "sampler_state": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, in the middle of a period too.

        Load the model and the optimizer first. Where the sampler or its options are others than then, it measures
        the model now, if it measures at all, and draws from the next period on.

        Raises:
            ConfigError: If the state is of another version or list of layers; of another sampler, seed, period,
                number of active layers or projection, unless the scheduler was made with ``allow_changes``; if
                another sampler can't measure the model.
        """
        if self.options.period is None:  # it followed from something that may be another number now
            self.period = state.get("period", self.period)
            self._identity = self._identity.with_period(self.period)
        changed = self._identity.changes(state, allow=self.options.allow_changes)
        branches = self.sampler.needs_projection or state.get("branches", False)
        if changed & {"projection", "projection_options"} or (branches and changed):
            self._switch.forget_state()
        self._round, self._steps = state["round"], state["steps"]
        self._began = state.get("began", self._steps - self._steps % self.period)
        self._history.load_state_dict(state)
        if changed & {"sampler", "sampler_options"}:
            # The state is of another one, and this one's own measurement, if any, of the model before it was loaded.
            self._history.changed = set(range(len(self.layers)))
            with naming(self.sampler, self._sampler_name, self._round):
                self._measure()
        else:
            self.sampler.load_state_dict(state["sampler_state"])
        self._inclusion = state["inclusion"]
        self._active = tuple(state["active"])
        self._entered = tuple(state.get("entered", ()))
        if self._switch.stepper is not None and state.get("backward"):
            self._switch.stepper.load_state_dict(state["backward"])
        with naming(self.sampler, self._sampler_name, self._round):
            full_rank = find_full_rank(self.sampler, self._context())
        self._switch.apply(self._active, self._round, full_rank)
        if self._switch.changes is not None and self._steps != self._began:
            self._switch.changes.resume(self.layers)
        self._switch.whole_states.resumed(changed=bool(changed))
        self._switch.place_state()
        self._state_is_placed = True
        self._set_learning_rates()
