"""Peak memory of a run, before it is run: the worst and the typical set of layers, and the usual ways beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from layersample.config import TrainConfig, check_length
from layersample.errors import ConfigError
from layersample.planning.active_sets import ActiveSets, find_active_sets
from layersample.planning.comparisons import compared_rows
from layersample.planning.live_memory import Kind
from layersample.planning.shapes import load_shape
from layersample.planning.simulation import StepMemory, simulate_step
from layersample.registry import PROJECTIONS

# Memory of a card by what it is sold as, in GiB; torch sees about 139 GiB of an H200.
CARDS: Mapping[str, float] = {"16 GB": 16, "24 GB": 24, "40 GB": 40, "48 GB": 48, "80 GB": 80, "141 GB": 139}
HEADROOM = 2**30
ModelLike = str | PretrainedConfig | PreTrainedModel


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
class Plan:
    """What a run will hold at most.

    Args:
        model: Name of the model.
        parameters: Of the model.
        config: How it is trained.
        gpus: GPUs that the run is sharded over.
        worst: The set of layers that holds most.
        typical: The median of many draws of the sampler, by the depth of the lowest layer.
        baselines: Other ways to train, by name, as commonly run.
        notes: What the plan had to assume.
    """

    model: str
    parameters: int
    config: TrainConfig
    gpus: int
    worst: PlannedSet
    typical: PlannedSet
    baselines: dict[str, StepMemory]
    notes: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Most bytes that a GPU holds at once, whatever layers are drawn."""
        return self.worst.memory.peak_bytes

    @cached_property
    def fits(self) -> dict[str, bool]:
        """Whether the run fits each common card, with :data:`HEADROOM` left for the driver and fragmentation."""
        return cards_that_fit(self.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types; all sizes are bytes on each GPU."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "gpus": self.gpus,
            "peak_bytes": self.peak_bytes,
            "parts": self.worst.memory.parts,
            "headroom_bytes": HEADROOM,
            "fits": self.fits,
            "sets": {"worst": _set_to_json(self.worst), "typical": _set_to_json(self.typical)},
            "baselines": {name: _memory_to_json(memory) for name, memory in self.baselines.items()},
            "notes": list(self.notes),
            "config": self.config.model_dump(mode="json"),
        }


def cards_that_fit(peak_bytes: int) -> dict[str, bool]:
    """Whether a peak fits each common card, with :data:`HEADROOM` left."""
    return {name: peak_bytes + HEADROOM <= size * 2**30 for name, size in CARDS.items()}


def plan(
    model: ModelLike, config: TrainConfig | None = None, *, gpus: int = 1, baselines: bool = True
) -> Plan:
    """Find the peak memory of a run by simulating its steps on fake tensors; nothing is allocated.

    Args:
        model: A built-in shape (:func:`layersample.planning.shapes.list_shapes`), a folder with ``config.json``, a hub
            id, a configuration, or a model.
        config: All options of the run; ``batch_size``, ``max_length`` and ``precision`` among them.
        gpus: GPUs that weights, gradients and optimizer state are sharded over (FSDP), at least 1. What the
            shards hold is computed from the simulated step of one GPU.
        baselines: Whether full fine-tuning, LISA as published, GaLore and, where peft is installed, LoRA are
            planned too.

    Raises:
        ConfigError: If the model is unknown, ``max_length`` is beyond its positions, or there are fewer layers
            than ``num_active``.

    Example:
        >>> from layersample.config import TrainConfig
        >>> plan("gpt2", TrainConfig(batch_size=1, max_length=64), baselines=False).fits["16 GB"]
        True
    """
    config = config or TrainConfig()
    if gpus < 1:
        raise ConfigError(f"gpus must be at least 1, but got gpus={gpus}.")
    shape = _check(model, config)
    config = apply_budget(config, shape)
    sets = find_active_sets(shape, config)
    worst = max((_simulate(shape, config, sets, s, gpus) for s in sets.worst), key=_peak)
    typical = _simulate(shape, config, sets, sets.typical, gpus)
    return Plan(
        model=model if isinstance(model, str) else type(model).__name__,
        parameters=sets.parameters,
        config=config,
        gpus=gpus,
        worst=max(worst, typical, key=_peak),
        typical=typical,
        baselines=_plan_baselines(shape, config, sets, gpus) if baselines else {},
        notes=sets.notes,
    )


def choose_num_active(model: ModelLike, config: TrainConfig, budget: str | float) -> int:
    """The most layers that a budget allows to train at a time.

    Args:
        model: As for :func:`plan`.
        config: All options of the run; its ``num_active`` doesn't matter.
        budget: Bytes that training may hold beyond the weights in the worst case, as in ``"2GiB"`` or
            ``"500MB"``; or the part of the parameters that may train at a time, above 0 and at most 1.

    Raises:
        ConfigError: If the budget can't be read, or doesn't suffice for one layer.
    """
    limit = parse_budget(budget)
    shape = _check(model, config.model_copy(update={"num_active": 1}))

    def cost(count: int) -> float:
        chosen = config.model_copy(update={"num_active": count})
        sets = find_active_sets(shape, chosen)
        if isinstance(limit, float):
            return max(sets.trainable(active) for active in sets.worst) / sets.parameters
        steps = [simulate_step(shape, chosen, active) for active in sets.worst]
        return max(step.peak_bytes - step.parts["weights"] for step in steps)

    least = cost(1)
    if least > limit:
        needed = f"{least:.3g} of the parameters" if isinstance(limit, float) else f"{least / 2**30:.2f}GiB"
        raise ConfigError(
            f"The budget must suffice for one layer, which takes {needed}, but got budget={budget!r}: "
            f"raise it, freeze embeddings and head, or use gradient checkpointing."
        )
    low, high = 1, find_active_sets(shape, config.model_copy(update={"num_active": 1})).num_layers
    while low < high:  # more layers never cost less
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
    return low


def apply_budget(config: TrainConfig, model: ModelLike | None = None) -> TrainConfig:
    """The options with the ``num_active`` that their budget allows; as they are without one.

    Raises:
        ConfigError: As :func:`choose_num_active`.
    """
    if config.budget is None:
        return config
    chosen = choose_num_active(model or config.model, config, config.budget)
    return config.model_copy(update={"num_active": chosen})


def parse_budget(budget: str | float) -> int | float:
    """Bytes as an integer, or a part of the parameters as a float.

    Raises:
        ConfigError: If it is neither.
    """
    text = str(budget).strip()
    number = text.rstrip("aBbGgiKkMmT")
    units = {"": 0, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    factor = units.get(text[len(number) :].strip().lower())
    try:
        value = float(number)
    except ValueError:
        factor = None
    if factor is None or not value > 0 or (factor == 0 and value > 1):
        raise ConfigError(
            f"budget must be a size such as '2GiB' or '500MB', or a part of the parameters above 0 and at most 1, "
            f"but got {budget!r}."
        )
    return int(value * factor) if factor else value


def shard(memory: StepMemory, sets: ActiveSets, gpus: int, active: Sequence[int]) -> StepMemory:
    """What each of several GPUs holds under FSDP2, computed from the step of one.

    Weights, gradients and state are split evenly. On top of its part a GPU holds, during forward and backward,
    the whole weights of the embeddings, head and norm and of two layers (the one at work and the next one),
    and the whole gradient of one trained unit before it is reduced. Activations are each GPU's own.
    """
    if gpus == 1:
        return memory
    whole = memory.moments["forward"]["weights"]
    item = whole / sets.parameters
    gathered = min(whole, int(item * (sets.outside + 2 * sets.largest_layer)))
    gradient = int(item * sets.largest_trained(active))
    shared: tuple[Kind, ...] = ("weights", "gradients", "optimizer_state", "masters")
    moments: dict[str, dict[Kind, int]] = {}
    for name, parts in memory.moments.items():
        split = {kind: -(-parts[kind] // gpus) if kind in shared else parts[kind] for kind in parts}
        if name == "optimizer":
            split["temporary"] = -(-parts["temporary"] // gpus)
        else:
            split["weights"] = min(whole, split["weights"] + gathered)
        if name == "backward":
            split["gradients"] += gradient
        moments[name] = split
    return StepMemory(moments)


def _check(model: ModelLike, config: TrainConfig) -> PretrainedConfig:
    PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)
    if isinstance(model, str):
        shape = load_shape(model)
    else:
        shape = model if isinstance(model, PretrainedConfig) else model.config
    check_length(config, shape)
    return shape


def _simulate(
    shape: PretrainedConfig, config: TrainConfig, sets: ActiveSets, active: Sequence[int], gpus: int
) -> PlannedSet:
    memory = shard(simulate_step(shape, config, active), sets, gpus, active)
    return PlannedSet(tuple(sets.names[i] for i in active), sets.trainable(active), memory)


def _plan_baselines(
    shape: PretrainedConfig, config: TrainConfig, sets: ActiveSets, gpus: int
) -> dict[str, StepMemory]:
    found = {}
    for name, row in compared_rows().items():
        lora_rank = row.pop("lora_rank", None)
        other = config.model_copy(update=row)
        if lora_rank is None:
            theirs = find_active_sets(shape, other)
            active = theirs.worst[0]
            found[name] = shard(simulate_step(shape, other, active), theirs, gpus, active)
        elif find_spec("peft") is not None:
            memory = simulate_step(shape, other, (), lora_rank=lora_rank)
            found[name] = shard(memory, replace(sets, always=0), gpus, ())
    return found


def _peak(planned: PlannedSet) -> int:
    return planned.memory.peak_bytes


def _set_to_json(planned: PlannedSet) -> dict[str, Any]:
    described = asdict(replace(planned, memory=StepMemory({})))
    del described["memory"]
    return {**described, **_memory_to_json(planned.memory)}


def _memory_to_json(memory: StepMemory) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak_bytes,
        "moment": memory.peak_moment,
        "parts": memory.parts,
        "moments": memory.moments,
    }
