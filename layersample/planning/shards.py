"""What each of several GPUs holds, under DDP or in shards, computed from the step of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layersample.planning.active_sets import ActiveSets
from layersample.planning.live_memory import Kind
from layersample.planning.simulation import StepMemory


def on_each_gpu(
    memory: StepMemory, sets: ActiveSets, gpus: int, active: Sequence[int], shards: str | None
) -> StepMemory:
    """What each of several GPUs holds.

    Args:
        memory: The step of one.
        sets: The model's layers and groups.
        gpus: How many there are.
        active: The layers that train.
        shards: How they share the model (``"fsdp2"``); ``None`` where each holds all of it.
    """
    if gpus == 1:
        return memory
    return replicate(memory) if shards is None else shard(memory, sets, gpus, active)


def replicate(memory: StepMemory) -> StepMemory:
    """What each of several GPUs holds under DDP: all that one does, and buckets as large as the gradients.

    The buckets hold parameters that train now alone, as the scheduler builds them anew at each switch.
    """
    buckets = max(parts["gradients"] for parts in memory.moments.values())
    moments: dict[str, dict[Kind, int]] = {
        name: {**parts, "gradients": parts["gradients"] + buckets} for name, parts in memory.moments.items()
    }
    return replace(memory, moments=moments)


def shard(memory: StepMemory, sets: ActiveSets, gpus: int, active: Sequence[int]) -> StepMemory:
    """What each of several GPUs holds under FSDP2, computed from the step of one.

    Weights, gradients and state are split evenly. On top of its part a GPU holds, during forward and backward,
    the whole weights of the embeddings, head and norm and of two layers (the one at work and the next one),
    and the whole gradient of one trained unit before it is reduced. Activations are each GPU's own.
    """
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
    return replace(memory, moments=moments)
