"""Figures that depend on the code alone, and not on the machine: planned bytes, bytes of state, coverage, chances.

``python -m tests.figures`` writes them anew into figures.json, for a change that is meant to change them; the difference
in version control then shows what it does. tests/test_figures.py compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from layersample import LayerScheduler, TrainConfig, create_sampler, measure_memory, plan
from layersample.sampling.answers import draw
from layersample.sampling.history import LayerHistory
from layersample.sampling.sampler import SamplingContext
from tests.helpers import make_batch, make_llama

STORED = Path(__file__).parent / "figures.json"

PLANS: dict[str, dict[str, Any]] = {
    "lisa": {},
    "full": {"sampler": "full"},
    "lisa, ends frozen": {"embeddings": "freeze", "head": "freeze", "norm": "freeze"},
    "lisa, state kept": {"state": "keep"},
    "lisa, bf16 on masters": {"precision": "bf16"},
    "lisa, bf16 without masters": {"precision": "bf16", "master_weights": False},
    "lisa, checkpointing": {"gradient_checkpointing": True},
    "lisa, step in backward": {"step_in_backward": True, "clip_by": "running"},
    "full, galore at rank 8": {"sampler": "full", "projection": "galore", "rank": 8},
}
STATES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "full": (torch.float32, {"sampler": "full"}),
    "lisa": (torch.float32, {"sampler": "lisa"}),
    "lisa, state kept": (torch.float32, {"sampler": "lisa", "state": "keep"}),
    "lisa, ends frozen": (torch.float32, {"sampler": "lisa", "embeddings": "freeze", "head": "freeze"}),
    "lisa, bf16 on masters": (torch.bfloat16, {"sampler": "lisa"}),
    "full, galore at rank 4": (
        torch.float32,
        {"sampler": "full", "projection": "galore", "projection_options": {"rank": 4}},
    ),
}
DRAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "lisa": ("lisa", {}),
    "lisa, bernoulli": ("lisa", {"draw": "bernoulli"}),
    "cyclic": ("cyclic", {}),
    "cyclic, reshuffled": ("cyclic", {"order": "reshuffled"}),
    "prior, increase": ("prior", {"weights": "increase"}),
    "prior, increase, systematic": ("prior", {"weights": "increase", "draw": "systematic"}),
}


def versions() -> dict[str, str]:
    """The versions on which planned bytes depend."""
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def planned_bytes(name: str) -> dict[str, int]:
    """Bytes by kind where a step of a small Llama holds most, for the worst set of layers."""
    config = TrainConfig(**{"batch_size": 2, "max_length": 64, "num_active": 1, **PLANS[name]})
    worst = plan(make_llama().config, config, baselines=False).worst.memory
    return {kind: size for kind, size in worst.parts.items() if size} | {"peak": worst.peak_bytes}


def bytes_held(name: str) -> dict[str, int]:
    """Bytes of a small Llama and its AdamW after five periods of one step."""
    dtype, options = STATES[name]
    model = make_llama(dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with LayerScheduler(model, optimizer, **options, num_active=1, period=1) as scheduler:
        for step in range(5):
            model(**make_batch(step), use_cache=False).loss.backward()
            optimizer.step()
            held = measure_memory(model, optimizer)
            scheduler.step()
            optimizer.zero_grad()
    return {kind: size for kind, size in vars(held).items() if size}


def drawn(name: str) -> dict[str, Any]:
    """What twelve periods of two of 30 layers train, and the chance of the lowest and the highest layer."""
    sampler, history = create_sampler(*DRAWS[name]), LayerHistory(30)
    layers = tuple(f"layer {i}" for i in range(30))
    for period in range(12):
        context = SamplingContext(
            layers, 2, round=period, statistics=history.statistics(period), allow_empty=True, costs=None
        )
        active = draw(sampler, context)
        chances = sampler.inclusion_probabilities(context)
        coverage = history.coverage(active)
        staleness = history.staleness(period, active)
        history.record(period, active)
    assert chances is not None
    return {
        "coverage": round(coverage, 6),
        "greatest staleness": max(staleness),
        "last set": list(active),
        "chances": [round(chances[0], 6), round(chances[-1], 6)],
    }


def measure() -> dict[str, Any]:
    """All of them."""
    return {
        "versions": versions(),
        "planned_bytes": {name: planned_bytes(name) for name in PLANS},
        "bytes_held": {name: bytes_held(name) for name in STATES},
        "drawn": {name: drawn(name) for name in DRAWS},
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    STORED.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    print(f"written: {STORED}")
