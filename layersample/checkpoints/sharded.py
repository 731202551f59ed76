"""Checkpoints that many ranks write together and any number of ranks reads: torch.distributed.checkpoint.

It loads optimizer state into a template, which it makes by a step of the optimizer over all parameters that
require a gradient, and wants state of each of them in the checkpoint. With layer sampling only some parameters
have any, so exactly those must require a gradient while it loads.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.files import replace_folder, write_json
from layersample.optim.masters import MASTER, REMAINDER
from layersample.optim.packing import unpacked
from layersample.optim.stand_ins import OptimizerView
from layersample.projection.low_rank import BASIS
from layersample.projection.projection import Projection
from layersample.unwrapping import unwrap

# What wrappers add to the names of parameters, and torch.distributed.checkpoint leaves out.
_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
_SCHEDULER = "scheduler.json"


def save_distributed(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, scheduler_state: Mapping[str, Any]
) -> None:
    """Write a checkpoint together with all other ranks; it is there whole or not at all. Call it on each rank.

    torch's own ``get_state_dict(model, optimizer)`` finds the state of 16-bit weights only inside of
    ``layersample.optim.packing.unpacked(optimizer)``.

    Args:
        folder: Where to, on a file system that all ranks share. An older one of that name is replaced.
        model: The model: sharded by ``fully_shard``, inside of DistributedDataParallel, or neither.
        optimizer: Its optimizer.
        scheduler_state: ``state_dict()`` of its LayerScheduler.

    Raises:
        ConfigError: If bf16 weights have masters.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    place = Path(folder)
    scratch = place.with_name(f".{place.name}.new")
    if any(MASTER in state or REMAINDER in state for state in optimizer.state.values()):
        raise ConfigError(
            "save_distributed doesn't keep the masters of bf16 weights: use layersample.Checkpoints on one rank, or "
            "shard fp32 weights with MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
        )
    with unpacked(optimizer):
        weights, state = get_state_dict(model, optimizer)
    first = _alone() or dist.get_rank() == 0
    if first:  # shards of a save that was killed, by more ranks perhaps, would come into this checkpoint
        shutil.rmtree(scratch, ignore_errors=True)
    if not _alone():
        dist.barrier()
    with _one_process_is_fine():
        save({"model": weights, "optimizer": state}, checkpoint_id=scratch)
    if first:
        write_json(scratch / _SCHEDULER, dict(scheduler_state))
        replace_folder(scratch, place)
    if not _alone():
        dist.barrier()  # no rank goes on before the checkpoint is in its place


def load_distributed(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, projection: Projection | None = None
) -> dict[str, Any]:
    """Load weights and optimizer state on all ranks, of which there may be more or fewer than wrote them.

    Then give what it returns to ``LayerScheduler(..., state_dict=)``.

    Args:
        folder: Where :func:`save_distributed` wrote to.
        model: The model, prepared as it was then; every parameter that may train requires a gradient.
        optimizer: Its optimizer, new.
        projection: The low-rank projection that the run has, whose state has shapes of its own.

    Returns:
        The state of the LayerScheduler.

    Raises:
        ConfigError: If there is no checkpoint, or it is of another projection.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    place = Path(folder)
    if not (place / _SCHEDULER).is_file():
        raise ConfigError(f"There must be a checkpoint of save_distributed in {place}, but there is none.")
    optimizer.state.clear()
    optimizer.zero_grad()
    scheduler_state: dict[str, Any] = json.loads((place / _SCHEDULER).read_text(encoding="utf-8"))
    stored = stored_state(place)
    rank, projected = _stored_projection(scheduler_state, stored)
    if rank != (None if projection is None else projection.rank):
        raise ConfigError(
            f"The checkpoint in {place} must be loaded with the projection that it was written with: the rank was "
            f"{rank or 'none'}, but is {projection.rank if projection else 'none'} now."
        )
    with (
        only_trainable(model, stored),
        _low_rank(model, optimizer, projection, projected & stored.keys()),
        unpacked(optimizer),
        _one_process_is_fine(),
    ):
        weights, state = get_state_dict(model, optimizer)
        for name, keys in stored.items():
            held: Any = state["state"][name]  # type: ignore[call-overload]
            for key in held.keys() - keys:
                del held[key]
        load({"model": weights, "optimizer": state}, checkpoint_id=place)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return scheduler_state


def optimizer_of(checkpoint: str | None, model: nn.Module) -> AbstractContextManager[None]:
    """While the Trainer loads a checkpoint's optimizer under FSDP2, only what has state there may train.

    Args:
        checkpoint: The Trainer's checkpoint, if it resumes from one.
        model: The model; any but FSDP2's is left alone.
    """
    if checkpoint is None or not any(hasattr(p, "device_mesh") for p in model.parameters()):
        return nullcontext()
    folder, file = Path(checkpoint) / "optimizer_0", Path(checkpoint) / "optimizer.bin"  # accelerate's names
    if folder.is_dir():
        return only_trainable(model, stored_state(folder))
    if file.is_file():
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return only_trainable(model, stored["state"])
    return nullcontext()


def stored_state(folder: Path, root: str = "optimizer") -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the optimizer state in a checkpoint of torch.distributed.checkpoint: by parameter, then by key.

    Args:
        folder: The checkpoint.
        root: Under which name it holds the optimizer.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    metadata = FileSystemReader(folder).read_metadata()
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for flat, path in (metadata.planner_data or {}).items():
        if path[:2] == (root, "state"):
            size = getattr(metadata.state_dict_metadata[flat], "size", ())
            found.setdefault(path[2], {})[path[3]] = tuple(size)
    return found


def _stored_projection(
    scheduler_state: Mapping[str, Any], stored: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> tuple[int | None, set[str]]:
    """The rank of a checkpoint's projection, if it has one, and the names of the parameters that are projected."""
    if "projected" in scheduler_state:
        projected = scheduler_state["projected"]
        if projected is None:
            return None, set()
        return projected["rank"], {_WRAPPERS.sub("", name) for name in projected["names"]}
    # Before the scheduler wrote it down: by the bases, which a layer that is frozen doesn't have.
    bases = {name: keys[BASIS][-1] for name, keys in stored.items() if BASIS in keys}
    return next(iter(bases.values()), None), set(bases)


@contextmanager
def _low_rank(
    model: nn.Module, optimizer: Optimizer, projection: Projection | None, names: Iterable[str]
) -> Iterator[None]:
    """Give the template the shapes of the projection for some parameters."""
    if projection is None:
        yield
        return
    view = OptimizerView(optimizer, projection=projection, master_weights=False, seed=0)
    parameters = {_WRAPPERS.sub("", name): p for name, p in unwrap(model).named_parameters()}
    view.set_projected({name: parameters[name] for name in names})
    try:
        yield
    finally:
        view.close()


@contextmanager
def only_trainable(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have some parameters alone require a gradient for a while.

    Args:
        model: The model.
        names: Names of the parameters, without what wrappers add.
    """
    chosen = set(names)
    parameters = dict(unwrap(model).named_parameters())
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(_WRAPPERS.sub("", name) in chosen)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without the warning that a checkpoint of torch.distributed is read or written by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())
