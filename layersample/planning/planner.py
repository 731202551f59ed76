"""Peak memory of a run, before it is run: the worst and the typical set of layers, and the usual ways beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.planning.active_sets import ActiveSets, find_active_sets
from layersample.planning.advice import Advice, find_advice
from layersample.planning.budget import apply_budget
from layersample.planning.cards import HEADROOM, cards_that_fit
from layersample.planning.comparisons import ComparedRow, compared_rows
from layersample.planning.fake_models import quietly
from layersample.planning.shards import on_each_gpu, stream
from layersample.planning.simulation import StepMemory, simulate_step
from layersample.planning.target import ModelLike, Target, find_target

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PlannedSet:
    """A set of layers and what a step with it holds.

    Args:
        layers: Names of the sampled layers that train.
        trainable: Parameters that train.
        memory: What the step holds on each GPU.
    """

    layers: tuple[str, ...]
    trainable: int
    memory: StepMemory


@dataclass(frozen=True)
class Baseline:
    """Another way to train the same model on the same batch.

    Args:
        memory: What it holds on the run's own terms: precision, masters, checkpointing, loss and so on.
        as_common: What it holds as commonly run, without anything that saves memory; ``None`` where that is the same.
    """

    memory: StepMemory
    as_common: StepMemory | None


@dataclass(frozen=True)
class Plan:
    """What a run will hold at most.

    Args:
        model: Name of the model.
        parameters: Number of the model's parameters.
        config: How it is trained; its ``num_active`` is the one that a budget chose, if there is one.
        gpus: GPUs that share the run; its ``shard`` says how.
        offload: Whether weights are in the host's memory, and streamed from there.
        worst: The set of layers that holds most.
        typical: The median of many draws of the sampler, by the depth of the lowest layer.
        baselines: Other ways to train, by name.
        advice: The change that would help most; ``None`` where it wasn't looked for, or nothing helps.
        notes: What the plan had to assume.
    """

    model: str
    parameters: int
    config: TrainConfig
    gpus: int
    offload: bool
    worst: PlannedSet
    typical: PlannedSet
    baselines: dict[str, Baseline]
    advice: Advice | None
    notes: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Most bytes that a GPU holds at once, whatever layers are drawn."""
        return self.worst.memory.peak_bytes

    @cached_property
    def fits(self) -> dict[str, bool]:
        """Whether the run fits each common card, with room left for the driver and fragmentation."""
        return cards_that_fit(self.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types; all sizes are bytes on each GPU."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "gpus": self.gpus,
            "offload": self.offload,
            "num_active": self.config.num_active,
            "peak_bytes": self.peak_bytes,
            "parts": self.worst.memory.parts,
            "host_bytes": self.worst.memory.host_bytes,
            "headroom_bytes": HEADROOM,
            "fits": self.fits,
            "sets": {"worst": _set_to_json(self.worst), "typical": _set_to_json(self.typical)},
            "baselines": {name: _baseline_to_json(row) for name, row in self.baselines.items()},
            "advice": None if self.advice is None else self.advice.to_json(),
            "notes": list(self.notes),
            "config": self.config.model_dump(mode="json"),
        }


def plan(
    model: ModelLike,
    config: TrainConfig | None = None,
    *,
    gpus: int = 1,
    offload: bool = False,
    baselines: bool = True,
    advice: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Find the peak memory of a run by simulating its steps on fake tensors; nothing is allocated.

    Args:
        model: A built-in shape (:func:`layersample.planning.shapes.list_shapes`), a folder with ``config.json``, a hub
            id, a configuration, or a model.
        config: All options of the run; ``batch_size``, ``max_length`` and ``precision`` among them.
        gpus: GPUs that share the run, at least 1: each holds all of the model (DDP), or with the option ``shard`` a
            part of it. What each holds is computed from the simulated step of one.
        offload: Whether weights, gradients and optimizer state are in the host's memory (FSDP2's
            ``CPUOffloadPolicy``), on one GPU or, in shards, on several. Computed likewise.
        baselines: Whether full fine-tuning, LISA as published, GaLore and, where peft is installed, LoRA are
            planned too: on the run's own terms, and as commonly run.
        advice: Whether to look for the change of options that would help most.
        progress: Told, before each simulated step, what is simulated.

    Raises:
        ConfigError: If the model is unknown or of a kind that isn't planned, ``max_length`` is beyond its positions,
            or there are fewer layers than ``num_active``; if the run can't be shared or offloaded.

    Example:
        >>> from layersample.config import TrainConfig
        >>> plan("gpt2", TrainConfig(batch_size=1, max_length=64), baselines=False).fits["16 GB"]
        True
    """
    config = config or TrainConfig()
    if gpus < 1:
        raise ConfigError(f"gpus must be at least 1, but got gpus={gpus}.")
    _check_sharing(config, gpus, offload)
    tell = progress or (lambda what: None)
    if config.budget is not None:
        tell(f"sets within a budget of {config.budget}")
    settled = apply_budget(config, model)
    with quietly(config.budget is not None):  # a budget has built the model before
        target, settled = find_target(model, settled)
    with quietly():
        return _plan(_Planner(target, gpus, offload, tell), settled, baselines=baselines, advice=advice)


def _check_sharing(config: TrainConfig, gpus: int, offload: bool) -> None:
    if gpus > 1 and config.step_in_backward:
        raise ConfigError(
            f"step_in_backward must be planned for one GPU, because gradients of several are added up after the "
            f"backward pass, but got gpus={gpus}."
        )
    if not offload:
        return
    if config.frozen_weights is not None:
        raise ConfigError(
            f"offload must be planned without frozen weights in fewer bits: it streams exact ones in their place, but "
            f"got frozen_weights={config.frozen_weights!r}."
        )
    if config.step_in_backward:
        raise ConfigError(
            "offload must be planned without step_in_backward: FSDP2 copies gradients to the host's memory, where the "
            "optimizer steps."
        )


def _plan(planner: _Planner, config: TrainConfig, *, baselines: bool, advice: bool) -> Plan:
    target = planner.target
    sets = find_active_sets(target.shape, config, kind=target.kind)
    worst = planner.worst(config, sets)
    typical = planner.one(config, sets, sets.typical, "typical set")
    worst = max(worst, typical, key=_peak)
    rows = compared_rows(config) if baselines else {}
    return Plan(
        model=target.name,
        parameters=sets.parameters,
        config=config,
        gpus=planner.gpus,
        offload=planner.offload,
        worst=worst,
        typical=typical,
        baselines={name: planner.compare(name, row, sets) for name, row in rows.items()},
        advice=planner.advise(config, sets, _peak(worst)) if advice else None,
        notes=(*target.notes, *sets.notes),
    )


@dataclass(frozen=True)
class _Planner:
    """Simulates steps of one model, as each GPU sees them."""

    target: Target
    gpus: int
    offload: bool
    tell: Progress

    def one(
        self, config: TrainConfig, sets: ActiveSets, active: Sequence[int], what: str | None
    ) -> PlannedSet:
        """A step with one set of layers; silent where ``what`` isn't given."""
        if what is not None:
            self.tell(what)
        memory = simulate_step(
            self.target.shape, config, active, kind=self.target.kind, trained=sets.possible
        )
        held = self._held(memory, sets, active, config)
        return PlannedSet(tuple(sets.names[i] for i in active), sets.trainable(active), held)

    def worst(self, config: TrainConfig, sets: ActiveSets) -> PlannedSet:
        """The set of layers that holds most."""
        names = [f"worst set, {number} of {len(sets.worst)}" for number in range(1, len(sets.worst) + 1)]
        planned = (self.one(config, sets, *pair) for pair in zip(sets.worst, names, strict=True))
        return max(planned, key=_peak)

    def first_peak(self, config: TrainConfig) -> int:
        """Peak of a run with the lowest layers."""
        sets = find_active_sets(self.target.shape, config, kind=self.target.kind)
        return _peak(self.one(config, sets, sets.worst[0], None))

    def worst_peak(self, config: TrainConfig) -> int:
        """Peak of a run with whatever layers."""
        sets = find_active_sets(self.target.shape, config, kind=self.target.kind)
        return max(_peak(self.one(config, sets, active, None)) for active in sets.worst)

    def advise(self, config: TrainConfig, sets: ActiveSets, peak: int) -> Advice | None:
        """The change that would help most."""
        return find_advice(
            config,
            sets,
            gpus=self.gpus,
            offload=self.offload,
            peak=peak,
            one_set=self.first_peak,
            every_set=self.worst_peak,
            progress=self.tell,
        )

    def compare(self, name: str, row: ComparedRow, sets: ActiveSets) -> Baseline:
        """What another way to train holds."""
        self.tell(name)
        memory = self._compared(row.own_terms, row.lora_rank, sets)
        if row.as_common is None:
            return Baseline(memory, None)
        self.tell(f"{name}, as commonly run")
        return Baseline(memory, self._compared(row.as_common, row.lora_rank, sets))

    def _compared(self, config: TrainConfig, lora_rank: int | None, sets: ActiveSets) -> StepMemory:
        shape, kind = self.target.shape, self.target.kind
        if lora_rank is not None:
            memory = simulate_step(shape, config, (), lora_rank=lora_rank, kind=kind)
            return self._held(memory, replace(sets, always=0), (), config)
        theirs = find_active_sets(shape, config, kind=kind)
        active = theirs.worst[0]
        return self._held(simulate_step(shape, config, active, kind=kind), theirs, active, config)

    def _held(
        self, memory: StepMemory, sets: ActiveSets, active: Sequence[int], config: TrainConfig
    ) -> StepMemory:
        """What each GPU holds of a step that was simulated for one with all of the model."""
        if self.offload:
            return stream(memory, sets, active, config)
        return on_each_gpu(memory, sets, self.gpus, active, config.shard)


def _peak(planned: PlannedSet) -> int:
    return planned.memory.peak_bytes


def _set_to_json(planned: PlannedSet) -> dict[str, Any]:
    described = asdict(replace(planned, memory=StepMemory({})))
    del described["memory"]
    return {**described, **_memory_to_json(planned.memory)}


def _baseline_to_json(row: Baseline) -> dict[str, Any]:
    common = None if row.as_common is None else _memory_to_json(row.as_common)
    return {**_memory_to_json(row.memory), "as_commonly_run": common}


def _memory_to_json(memory: StepMemory) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak_bytes,
        "moment": memory.peak_moment,
        "parts": memory.parts,
        "moments": memory.moments,
    }
