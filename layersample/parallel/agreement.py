"""What ranks say to each other: that they train the same layers, and their losses."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from layersample.errors import SharedError

_DETAIL_BYTES = 4096


def is_distributed() -> bool:
    """Whether this process is one of several that talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def num_ranks() -> int:
    """How many processes train together; 1 where there is no group of them."""
    return dist.get_world_size() if is_distributed() else 1


def check_agreement(
    active: Sequence[str],
    *,
    round: int,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Make sure that all ranks train the same layers in a period. Does nothing in a single process.

    Ranks draw the same set without a word, from the seed and the period. Where they don't (another seed or
    number of steps on one of them, a sampler that measured other data), gradients of different layers would
    be averaged, or the ranks would wait for each other without end.

    Args:
        active: Names of the layers that train on this rank.
        round: Number of the period on this rank.
        device: Where the group's gradients are: NCCL needs a CUDA device, gloo takes the CPU.
        group: The ranks that must agree; all of them by default.

    Raises:
        SharedError: On every rank, if they don't agree. It names the sets and who drew them.
    """
    if not is_distributed():
        return
    said = f"period {round}: {', '.join(active) or 'no layer'}".encode()
    digest = hashlib.sha256(said).digest()[:8]
    if len(set(_gather(digest, device, group))) == 1:
        return
    # All ranks see that the digests differ, so all of them come here.
    told = _gather(said[:_DETAIL_BYTES].ljust(_DETAIL_BYTES), device, group)
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    ranks_by_set: dict[str, list[int]] = {}
    for rank, text in zip(members, told, strict=True):
        ranks_by_set.setdefault(text.decode(errors="replace").rstrip(), []).append(rank)
    sets = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {drawn}"
        for drawn, ranks in ranks_by_set.items()
    )
    raise SharedError(
        f"All ranks must train the same layers, but they drew different ones ({sets}). Give every rank the same "
        f"seed, period and options, call step() equally often on each, and give samplers that measure the "
        f"same batches on every rank."
    )


def agree(
    answer: bool,
    what: str,
    *,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Make sure that all ranks answer a question alike, or they would wait for each other without end.

    Args:
        answer: This rank's answer.
        what: The question, for messages.
        device: Where the ranks' gradients are.
        group: The ranks that must agree; all of them by default.

    Raises:
        SharedError: On every rank, if they don't.
    """
    if not is_distributed():
        return
    told = [bool(part[0]) for part in _gather(bytes([answer]), device, group)]
    if len(set(told)) > 1:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        yes = ", ".join(str(rank) for rank, said in zip(members, told, strict=True) if said)
        no = ", ".join(str(rank) for rank, said in zip(members, told, strict=True) if not said)
        raise SharedError(
            f"All ranks must agree {what}, but ranks {yes} say yes, and ranks {no} no: a sampler must decide by what "
            "it is told and by its context alone, which are the same everywhere."
        )


def mean_over_ranks(value: float, *, device: torch.device | str = "cpu") -> float:
    """The mean of a number over all ranks; the number itself in a single process.

    Args:
        value: This rank's number.
        device: Where the ranks' gradients are.
    """
    if not is_distributed():
        return value
    # Added up in the same order on every rank, which an all-reduce doesn't promise.
    told = _gather(struct.pack("<d", value), device, None)
    return math.fsum(struct.unpack("<d", part)[0] for part in told) / len(told)


def tell_all(value: Any) -> list[Any]:
    """What each rank has to say, in their order; every rank calls it.

    Args:
        value: Of JSON types.
    """
    if not is_distributed():
        return [value]
    device, message = _where_ranks_talk(), json.dumps(value).encode()
    lengths = [
        struct.unpack("<q", part)[0] for part in _gather(struct.pack("<q", len(message)), device, None)
    ]
    told = _gather(message.ljust(max(lengths)), device, None)
    return [json.loads(part) for part in told]


def _where_ranks_talk() -> torch.device:
    """A device from which the default group takes tensors: the CPU, unless all it has is NCCL."""
    if "gloo" in dist.get_backend_config() or "mpi" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _gather(message: bytes, device: torch.device | str, group: dist.ProcessGroup | None) -> list[bytes]:
    """The messages of all ranks, which are of the same length."""
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.cpu().numpy().tobytes() for part in parts]
