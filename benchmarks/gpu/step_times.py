"""Time of a step: full fine-tuning, LoRA, LISA as published and ours, in turns so that a drift meets them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.planning.fake_models import add_lora
from layersample.planning.simulation import schedule_given

from .bench import Bench, Row, loss_of

_ENDS = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
_PLAIN = {"loss_chunk": None, "recompute": False}
_BACKWARD = {"step_in_backward": True, "clip_by": "running"}


@dataclass(frozen=True)
class Way:
    """A way to train: where its two layers are, and the options of the run.

    Args:
        place: ``bottom``, ``middle`` or ``top``; ``all`` for every layer, ``lora`` for adapters.
        options: Options of the run.
        compiled: Whether each layer is compiled.
    """

    place: str
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


WAYS = {
    "full fine-tuning": Way("all", {**_PLAIN, "sampler": "full"}),
    "LoRA, rank 16": Way("lora", _PLAIN),
    "LISA as published": Way("middle", {**_PLAIN, "state": "keep"}),
    "2 layers at the bottom": Way("bottom", {**_PLAIN, **_ENDS}),
    "2 layers in the middle": Way("middle", {**_PLAIN, **_ENDS}),
    "2 layers at the top": Way("top", {**_PLAIN, **_ENDS}),
    "middle, step in backward": Way("middle", {**_PLAIN, **_ENDS, **_BACKWARD}),
    "middle, chunked loss": Way("middle", {**_PLAIN, **_ENDS, "loss_chunk": 128}),
    "middle, recomputation": Way("middle", {**_PLAIN, **_ENDS, "recompute": True}),
    "middle, checkpointing": Way("middle", {**_PLAIN, **_ENDS, "gradient_checkpointing": True}),
    "middle, GaLore": Way("middle", {**_PLAIN, **_ENDS, "projection": "galore", "rank": 128}),
    "middle, compiled layers": Way("middle", {**_PLAIN, **_ENDS}, compiled=True),
}


def measure(bench: Bench) -> Iterator[Row]:
    """Time every way in turns, and say what part of the device's products of matrices full fine-tuning reaches."""
    shape = bench.shape("tinyllama-1.1b")
    batch, length, rounds = (2, 64, 2) if bench.tiny else (4, 1024, 7)
    tokens = bench.tokens(shape, batch, length)
    ways = {name: way for name, way in WAYS.items() if way.place != "lora" or find_spec("peft") is not None}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(_time(bench, shape, way, tokens))
            bench.release()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    full = medians["full fine-tuning"]
    for name in WAYS:
        if name not in medians:
            yield Row("time of a step", name, "", "", "not available", {"needs": "peft"})
            continue
        figures = {"seconds": seconds[name], "tokens_per_second": batch * length / medians[name]}
        found = f"{medians[name] * 1000:.1f} ms, {medians[name] / full:.2f} of full, "
        found += f"{batch * length / medians[name]:,.0f} tokens/s"
        yield Row("time of a step", name, found, "", "measured", figures)
    yield _share(bench, shape, batch * length / full)


def _time(bench: Bench, shape: Any, way: Way, tokens: torch.Tensor) -> float:
    """Median seconds of a few steps, behind one that sets things up."""
    options = dict(way.options)
    if bench.tiny and options.get("projection"):
        options["rank"] = 8
    config = TrainConfig(**{"precision": "bf16", "master_weights": False, **options})
    model = bench.model(shape, torch.bfloat16)
    last = shape.num_hidden_layers
    places = {
        "all": tuple(range(last)),
        "lora": (),
        "bottom": (0, 1),
        "middle": (last // 3, 2 * last // 3),
        "top": (last - 2, last - 1),
    }
    scheduler = None
    if way.place == "lora":
        model = add_lora(model, 16)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)
    if way.place != "lora":
        scheduler = schedule_given(model, optimizer, config, places[way.place])
    if way.compiled:
        for layer in model.model.layers:  # on a CPU for the lines alone: its compiler would take minutes
            layer.compile(backend="inductor" if bench.on_gpu else "eager")
    saver = save_memory(
        model,
        loss_chunk=config.chunk_positions,
        recompute=config.recompute,
        gradient_checkpointing=config.gradient_checkpointing,
    )

    def step() -> None:
        loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    with saver:
        for _ in range(1 if bench.tiny else 3):
            step()
        taken = statistics.median(bench.seconds(step) for _ in range(1 if bench.tiny else 5))
    if scheduler is not None:
        scheduler.close(check=False)
    return taken


def _share(bench: Bench, shape: Any, tokens_per_second: float) -> Row:
    name = "full fine-tuning, share of the measured rate of products"
    if not bench.on_gpu:
        return Row("arithmetic", name, "", "", "no meaning", {})
    side = 8192
    a = torch.randn(side, side, dtype=torch.bfloat16, device=bench.device)
    multiply: Callable[[], object] = lambda: a @ a  # noqa: E731
    multiply()
    rate = 2 * side**3 / statistics.median(bench.seconds(multiply) for _ in range(10))
    with torch.device("meta"):
        parameters = sum(
            p.numel()
            for p in Bench(torch.device("meta"), bench.tiny).model(shape, torch.bfloat16).parameters()
        )
    used = (
        6 * parameters * tokens_per_second
    )  # products of forward and backward; scores of attention left out
    figures = {"measured_flops": rate, "used_flops": used}
    return Row("arithmetic", name, f"{used / rate:.0%} of {rate / 1e12:.0f} TFLOP/s", "", "measured", figures)
