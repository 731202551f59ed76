"""Runs of every sampler in a plain loop, which are killed in a backward pass; see test_killed_runs.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from layersample import Checkpoints, LayerScheduler, list_samplers
from tests.helpers import make_batch, make_llama, weights_of

STEPS, PERIOD, SAVED, KILLED = 7, 3, 4, 5  # it is saved in the middle of the second period

OPTIONS: dict[str, dict[str, Any]] = {  # those that must be there, or make a measurement short
    "lora_norm": {"probe_steps": 1, "probe_rank": 2},
    "owlore": {"metric": "hill"},
    "grass": {"probe_batches": 1},
    "prior": {"weights": "increase"},
    "blockllm": {"patience": 1},
    "ist": {"every": 1},
    "freeze_converged": {"sampler": "misa", "grace": 1},
    "mixture": {"samplers": ["spectrum", "bandit"], "shares": [1, 3]},
    "max_wait": {"sampler": "freeze_converged", "sampler_options": {"sampler": "misa"}},
}
MOVING: dict[str, Any] = {"granularity": "module", "inactive": "sgd"}
"""Parts of layers, the others of which move: for samplers that learn from what they see."""


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Sampler and options of the scheduler, by the case's name."""
    samplers = list_samplers()
    built_in = sorted(n for n, c in samplers.items() if c.__module__.startswith("layersample_strategies"))
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in built_in:
        projected = samplers[name].needs_projection
        found[name] = name, {"projection": "galore", "projection_options": {"rank": 4}} if projected else {}
    for name in ("adagradselect", "bandit", "blockllm", "freeze_converged", "grass", "max_wait", "misa"):
        found[f"{name}-moving"] = name, MOVING
    return found


def run(case: str, folder: Path, *, killed: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train to the end from the last checkpoint, if there is one.

    Args:
        case: Its name.
        folder: Of the checkpoints.
        killed: Whether the process kills itself in a backward pass, without any farewell.

    Returns:
        The weights and the scheduler's state.
    """
    sampler, options = cases()[case]
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LayerScheduler(
        model,
        optimizer,
        sampler,
        sampler_options=OPTIONS.get(sampler),
        num_active=1,
        period=PERIOD,
        batches=[make_batch(50), make_batch(51)],
        **options,
    )
    checkpoints = Checkpoints(folder, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    for step in range(checkpoints.load_last(), STEPS):
        loss = model(**make_batch(step)).loss
        if killed and step == KILLED:
            weight = model.get_parameter("model.embed_tokens.weight")
            weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[no-untyped-call]
        loss.backward()
        optimizer.step()
        scheduler.step(loss=loss)
        optimizer.zero_grad()
        if step + 1 == SAVED:
            checkpoints.save(step + 1)
    state = scheduler.state_dict()
    scheduler.close()
    return weights_of(model), state


def main(folder: str) -> None:
    """Kill a run of each case; this process never trains, or its children couldn't."""
    torch.set_num_threads(1)
    for case in cases():
        child = os.fork()
        if not child:
            try:
                run(case, Path(folder) / case, killed=True)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(case, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
