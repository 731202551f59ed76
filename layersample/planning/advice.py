"""What would make a run hold less: a few changes, each tried, and the one that helps most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layersample.config import TrainConfig
from layersample.planning.active_sets import ActiveSets

_LEAST_GAIN = 0.02  # of the peak: less isn't worth a word


@dataclass(frozen=True)
class Change:
    """A change of options that may make a run smaller.

    Args:
        options: The options to change.
        flags: What a user types for it.
        reason: Why it helps, or what it costs, as a phrase.
    """

    options: dict[str, Any]
    flags: str
    reason: str

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The options with the change."""
        return config.model_copy(update=self.options)


@dataclass(frozen=True)
class Advice:
    """The change that helps most.

    Args:
        change: The change.
        peak_bytes: Most that the run then holds, on each GPU.
        tried: Peak of the run with each change that was tried, by its flags, for one set of layers.
    """

    change: Change
    peak_bytes: int
    tried: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The advice in JSON types."""
        return {
            "options": self.change.options,
            "flags": self.change.flags,
            "reason": self.change.reason,
            "peak_bytes": self.peak_bytes,
            "tried": self.tried,
        }


def possible_changes(
    config: TrainConfig, sets: ActiveSets, gpus: int = 1, *, offload: bool = False
) -> list[Change]:
    """The changes that a run doesn't have yet.

    Args:
        config: The run's options.
        sets: Its layers and groups.
        gpus: GPUs that share the run.
        offload: Whether weights are streamed from the host's memory, in shards.
    """
    changes = []

    def add(possible: bool, options: dict[str, Any], flags: str, reason: str) -> None:
        if possible:
            changes.append(Change(options, flags, reason))

    for group, what in (("embeddings", "the embedding"), ("head", "the head")):
        part = sets.groups.get(group, 0) / sets.parameters
        add(
            part > 0 and getattr(config, group) != "freeze",
            {group: "freeze"},
            f"--{group} freeze",
            f"{what} is {part:.0%} of the parameters",
        )
    add(
        not config.gradient_checkpointing and sets.can_checkpoint,
        {"gradient_checkpointing": True},
        "--gradient-checkpointing",
        "a step takes about a third longer",
    )
    add(
        config.chunk_positions is None and sets.can_chunk,
        {"loss_chunk": 128},
        "--loss-chunk 128",
        "logits never exist whole",
    )
    add(not config.recompute, {"recompute": True}, "--recompute", "the same to the bit")
    fewer = max(1, config.num_active // 2)
    # A budget chooses the number by itself.
    add(
        fewer < config.num_active and config.budget is None and config.draw_budget is None,
        {"num_active": fewer},
        f"--num-active {fewer}",
        f"{fewer} in place of {config.num_active} layers train at a time",
    )
    masters = config.has_masters
    add(
        gpus > 1 and not offload and config.shard is None and config.frozen_weights is None and not masters,
        {"shard": "fsdp2"},
        "--shard fsdp2",
        f"each of {gpus} GPUs holds a part of the model",
    )
    # Masters of bf16 weights aren't kept in shards.
    add(
        config.precision != "bf16" and config.shard is None,
        {"precision": "bf16"},
        "--dtype bf16",
        "weights of half the size",
    )
    add(
        gpus == 1 and not offload and not config.step_in_backward and config.precision != "fp16-mixed",
        {"step_in_backward": True, "clip_by": "running" if config.clip else config.clip_by},
        f"--step-in-backward{' --clip-by running' if config.clip else ''}",
        "gradients never stand side by side",
    )
    add(
        masters,
        {"master_weights": False},
        "--no-master-weights",
        "but small updates are then lost in rounding",
    )
    add(config.state == "keep", {"state": "drop"}, "--state drop", "frozen layers then hold no state")
    return changes


def find_advice(
    config: TrainConfig,
    sets: ActiveSets,
    *,
    gpus: int = 1,
    offload: bool = False,
    peak: int,
    one_set: Callable[[TrainConfig], int],
    every_set: Callable[[TrainConfig], int],
    progress: Callable[[str], None],
) -> Advice | None:
    """Try each change, and give the one that helps most.

    Args:
        config: The run's options.
        sets: Its layers and groups.
        gpus: GPUs that share the run.
        offload: Whether weights are streamed from the host's memory.
        peak: What the run holds at most, in bytes.
        one_set: Peak of a run with some options, for one large set of layers.
        every_set: The same for the worst of all sets.
        progress: Told what is being tried.

    Returns:
        The advice, or none where nothing gains at least 2%.
    """
    changes = {change.flags: change for change in possible_changes(config, sets, gpus, offload=offload)}
    tried = {}
    for flags, change in changes.items():
        progress(f"this run with {flags}")
        tried[flags] = one_set(change.apply(config))
    if not tried:
        return None
    best = changes[min(tried, key=lambda flags: tried[flags])]
    progress(f"every set with {best.flags}")
    found = every_set(best.apply(config))
    return Advice(best, found, tried) if found <= (1 - _LEAST_GAIN) * peak else None
