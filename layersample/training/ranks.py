"""The processes of a run: what one of them does for all, what they do alike, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from layersample.errors import ConfigError, SharedError, short, some
from layersample.parallel.agreement import tell_all

_T = TypeVar("_T")

_PATIENCE = 1800  # seconds that a rank waits for the others: the Trainer's own default


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        rank: Its number, from 0.
        count: How many there are, on all machines.
        local_rank: Its number on this machine, from 0.
        joined: Whether a launcher has started it, if only as the only one.
        own_group: Whether the process group was made for this run, and ends with it.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    joined: bool = False
    own_group: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def together(self, do: Callable[[], _T], *, first_of_machine_first: bool = False) -> _T:
        """Do something on every rank; where it fails on any, it fails on all.

        Args:
            do: What to do; it must not wait for other ranks.
            first_of_machine_first: Whether one rank of each machine does it before the others, so that what it fetches
                is there for them.

        Raises:
            SharedError: If a :class:`ConfigError` came on any rank.
        """
        if self.count == 1:
            return do()
        done: list[_T] = []
        for now in (self.local_rank == 0, self.local_rank != 0) if first_of_machine_first else (True,):
            fault = None
            if now:
                try:
                    done.append(do())
                except ConfigError as error:
                    fault = str(error)
            _raise_alike(tell_all(fault))
        return done[0]

    def on_first(self, do: Callable[[], _T]) -> _T:
        """Do something on the first rank alone, and give what comes of it to all.

        Args:
            do: What to do; it gives JSON types, and must not wait for other ranks.

        Raises:
            SharedError: On all ranks, if a :class:`ConfigError` came.
        """
        if self.count == 1:
            return do()
        made: list[_T] = []
        self.together(lambda: made.append(do()) if self.first else None)
        result: _T = tell_all(made[0] if made else None)[0]
        return result

    def compare(self, what: str, values: Mapping[str, Any]) -> None:
        """Make sure that all ranks have the same.

        Args:
            what: What it is: ``"options"``.
            values: By name; of JSON types.

        Raises:
            SharedError: On all ranks, if they don't; it gives each rank's value of what differs.
        """
        told = tell_all(dict(values))
        differing = [
            f"{name} is {_by_value([each.get(name) for each in told])}"
            for name in values
            if any(each.get(name) != told[0].get(name) for each in told)
        ]
        if differing:
            raise SharedError(f"All ranks must have the same {what}, but {'; '.join(differing)}.")

    def wait(self) -> None:
        """Wait until all ranks are here."""
        tell_all(None)

    def leave(self) -> None:
        """Leave the others, once all have come to the end."""
        self.wait()
        if self.own_group:
            dist.destroy_process_group()


def join_ranks(patience: float | None = None) -> Ranks:
    """Join the other processes of a run, if a launcher has started several.

    Args:
        patience: Seconds that a rank waits for the others, before it gives up; by default half an hour.

    Raises:
        ConfigError: If there are more ranks on this machine than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own_group = not dist.is_initialized()
    if own_group:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"Each rank of a machine needs a GPU of its own, but rank {local} was started on a machine with "
                    f"{torch.cuda.device_count()}: start as many processes as there are GPUs."
                )
            torch.cuda.set_device(local)
        # With gloo beside NCCL, what ranks tell each other in words needs no GPU.
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience or _PATIENCE))
    return Ranks(dist.get_rank(), dist.get_world_size(), local, joined=True, own_group=own_group)


def _raise_alike(faults: list[str | None]) -> None:
    """Raise the faults of all ranks on each of them."""
    said = {rank: fault for rank, fault in enumerate(faults) if fault is not None}
    if not said:
        return
    texts = list(dict.fromkeys(said.values()))
    if len(texts) == 1 and 0 in said:
        raise SharedError(texts[0])
    by_text = ((text, [str(rank) for rank, fault in said.items() if fault == text]) for text in texts)
    raise SharedError(" ".join(f"On rank {', '.join(ranks)}: {text}" for text, ranks in by_text))


def _by_value(values: list[Any]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(short(value), []).append(str(rank))
    return ", ".join(f"{value} on rank {some(numbers)}" for value, numbers in ranks.items())
