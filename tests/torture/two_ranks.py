"""Random runs of two ranks, saved in the middle and gone on with: they must end as one process does."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from layersample import LayerScheduler, load_distributed, save_distributed
from layersample.projection.projection import Projection
from layersample.registry import create_projection
from tests.helpers import make_llama
from tests.parallel.ranks import NUM_LAYERS, own_rows, train

_STEPS, _SECONDS = 6, 240
_OPTIONS = "num_active period seed state embeddings granularity switch_warmup".split()


def draw(seed: int, index: int) -> dict[str, Any]:
    """A random run; the same for the same numbers."""
    rng = random.Random(f"ranks {seed} {index}")
    galore = {"rank": 4, "basis": "svd", "update_gap": rng.randint(1, 3)}
    return {
        "engine": rng.choice(("ddp", "fsdp", "fsdp")),
        "sampler": rng.choice(("lisa", "cyclic", "full", "misa", "grass")),
        "granularity": rng.choice(("layer", "layer", "block", "tensor")),
        "switch_warmup": rng.choice((0, 0, 2)),
        "num_active": rng.randint(1, 3),
        "period": rng.randint(1, 3),
        "seed": rng.randrange(100),
        "state": rng.choice(("drop", "keep", "offload")),
        "embeddings": rng.choice(("train", "freeze", "sample")),
        "galore": rng.choice((None, galore)),
        "saved_at": rng.randint(1, _STEPS - 1),
    }


def run(case: dict[str, Any], folder: Path) -> str | None:
    """Train on two ranks and on one; say where they differ, or nothing."""
    children = [_fork(case, folder, rank) for rank in range(2)]
    end, failed = time.monotonic() + _SECONDS, False
    while children and not failed and time.monotonic() < end:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                failed |= status != 0
        time.sleep(0.01)
    for child in children:  # the other one waits for a rank that is gone
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if failed or children:
        return "\n".join((folder / f"log-{rank}").read_text(errors="replace")[-1000:] for rank in range(2))
    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, _schedule(case, model, optimizer), range(_STEPS))
    ended = torch.load(folder / "ended.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        difference = float((parameter.detach() - ended[name]).abs().max())
        if not difference <= (1e-6 if case["galore"] else 1e-9):
            return f"{name} differs by {difference:.3g}"
    return None


def _projection(case: dict[str, Any]) -> Projection | None:
    return create_projection("galore", case["galore"]) if case["galore"] else None


def _schedule(case: dict[str, Any], model: Any, optimizer: Any, **more: Any) -> LayerScheduler:
    options = {key: case[key] for key in _OPTIONS}
    return LayerScheduler(
        model, optimizer, case["sampler"], projection=_projection(case), check=True, **options, **more
    )


def _fork(case: dict[str, Any], folder: Path, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine alone
    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), 2),  # type: ignore[attr-defined]
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        _rank(case, folder)
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank(case: dict[str, Any], folder: Path) -> None:
    model, optimizer = _build(case)
    scheduler = _schedule(case, model, optimizer)
    train(model, optimizer, scheduler, range(case["saved_at"]), part=own_rows())
    save_distributed(folder / "saved", model, optimizer, scheduler.state_dict())
    model, optimizer = _build(case)
    state = load_distributed(folder / "saved", model, optimizer, _projection(case))
    scheduler = _schedule(case, model, optimizer, state_dict=state)
    train(model, optimizer, scheduler, range(case["saved_at"], _STEPS), part=own_rows())
    ended = {
        name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in model.named_parameters()
    }
    if dist.get_rank() == 0:
        torch.save({name: value.detach() for name, value in ended.items()}, folder / "ended.pt")


def _build(case: dict[str, Any]) -> tuple[Any, Any]:
    model: Any = make_llama(NUM_LAYERS, dtype=torch.float64)
    if case["engine"] == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
