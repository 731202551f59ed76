"""Time of a step: full fine-tuning, LoRA, LISA as published and ours, in turns so that a drift meets them alike."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from layersample.activations.save_memory import save_memory
from layersample.config import TrainConfig
from layersample.planning.fake_models import add_lora
from layersample.planning.simulation import schedule_given

from .bench import Bench, Job, Row, loss_of

_ENDS = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
_PLAIN = {"loss_chunk": None, "recompute": False}
_BACKWARD = {"step_in_backward": True, "clip_by": "running"}
_SIDE = 8192  # of the matrices by which the device's rate of products is measured
_FULL, _MIDDLE = "full fine-tuning", "2 layers in the middle"


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

    @property
    def needs(self) -> str | None:
        """The package that it needs and that isn't installed."""
        package = {"lora": "peft"}.get(self.place)
        package = "bitsandbytes" if self.options.get("frozen_weights") == "nf4" else package
        return package if package and find_spec(package) is None else None


WAYS = {
    _FULL: Way("all", {**_PLAIN, "sampler": "full"}),
    "LoRA, rank 16": Way("lora", _PLAIN),
    "LISA as published": Way("middle", {**_PLAIN, "state": "keep"}),
    "2 layers at the bottom": Way("bottom", {**_PLAIN, **_ENDS}),
    _MIDDLE: Way("middle", {**_PLAIN, **_ENDS}),
    "2 layers at the top": Way("top", {**_PLAIN, **_ENDS}),
    "middle, masters": Way("middle", {**_PLAIN, **_ENDS, "master_weights": True}),
    "middle, step in backward": Way("middle", {**_PLAIN, **_ENDS, **_BACKWARD}),
    "middle, chunked loss": Way("middle", {**_PLAIN, **_ENDS, "loss_chunk": 128}),
    "middle, recomputation": Way("middle", {**_PLAIN, **_ENDS, "recompute": True}),
    "middle, checkpointing": Way("middle", {**_PLAIN, **_ENDS, "gradient_checkpointing": True}),
    "middle, GaLore": Way("middle", {**_PLAIN, **_ENDS, "projection": "galore", "rank": 128}),
    "middle, frozen weights int8": Way("middle", {**_PLAIN, **_ENDS, "frozen_weights": "int8"}),
    "middle, frozen weights nf4": Way("middle", {**_PLAIN, **_ENDS, "frozen_weights": "nf4"}),
    "middle, compiled layers": Way("middle", {**_PLAIN, **_ENDS}, compiled=True),
}


def jobs(bench: Bench) -> dict[str, Job]:
    """One job: the ways are compared in the same minutes."""
    return {"step_times": partial(_measure, bench)}


def _measure(bench: Bench) -> Iterator[Row]:
    """Time every way in turns, beside its share of full fine-tuning's products and of the device's rate of them."""
    batch, length, rounds = (2, 64, 2) if bench.tiny else (4, 1024, 5)
    ways = {name: way for name, way in WAYS.items() if way.needs is None}
    base = bench.model(bench.shape("tinyllama-1.1b"), torch.bfloat16)
    tokens = bench.tokens(base.config, batch, length)
    products = {name: _products(bench, base, way, tokens) for name, way in ways.items()}
    rate = _rate_of_products(bench)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    graphs = dict.fromkeys(ways, 0)
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(_time(bench, base, way, tokens))
            graphs[name] = max(graphs[name], _compiled_graphs())  # the next round finds them there
            bench.release()
    torch.compiler.reset()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, way in WAYS.items():
        if name not in medians:
            yield Row("time of a step", name, "", "", "not available", {"needs": way.needs})
            continue
        figures = {
            "seconds": seconds[name],
            "tokens_per_second": batch * length / medians[name],
            "flops": products[name],
            "flops_per_second_of_the_device": rate,
            "compiled_graphs": graphs[name],
        }
        found = f"{medians[name] * 1000:.1f} ms, {medians[name] / medians[_FULL]:.2f} of full, "
        found += f"{batch * length / medians[name]:,.0f} tokens/s"
        if rate is not None:
            found += f", {products[name] / medians[name] / rate:.0%} of {rate / 1e12:.0f} TFLOP/s"
        claimed = f"{products[name] / products[_FULL]:.2f} of full by its products"
        yield Row("time of a step", name, found, claimed, "measured", figures)


def _products(bench: Bench, base: Any, way: Way, tokens: Tensor) -> int:
    """Floating-point operations of the products of matrices in one step."""
    step, end = _prepare(bench, base, way, tokens, compiled=False)
    try:
        step()
        # As plain products: the counter doesn't know a fused kernel whose keys have fewer heads than its queries.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
    finally:
        end()
    bench.release()
    return int(counter.get_total_flops())


def _time(bench: Bench, base: Any, way: Way, tokens: Tensor) -> float:
    """Median seconds of a few steps, behind some that set things up."""
    step, end = _prepare(bench, base, way, tokens, compiled=way.compiled)
    try:
        for _ in range(1 if bench.tiny else 3):
            step()
        return statistics.median(bench.seconds(step) for _ in range(1 if bench.tiny else 5))
    finally:
        end()


def _prepare(
    bench: Bench, base: Any, way: Way, tokens: Tensor, *, compiled: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of a way, on a copy of the model, and what ends it."""
    options = dict(way.options)
    if bench.tiny and options.get("projection"):
        options["rank"] = 8
    config = TrainConfig(**{"precision": "bf16", "master_weights": False, **options})
    model = copy.deepcopy(base)
    last = model.config.num_hidden_layers
    places = {
        "all": tuple(range(last)),
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
        scheduler.step()  # where state is kept, the first period trains everything
    torch._dynamo.utils.counters.clear()
    if compiled:
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

    def end() -> None:
        saver.close()
        if scheduler is not None:
            scheduler.close(check=False)

    return step, end


def _compiled_graphs() -> int:
    """Graphs of the last compiled model: more than a few mean that it was compiled again and again."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _rate_of_products(bench: Bench) -> float | None:
    """Floating-point operations a second of a large product in bf16; None where it isn't a GPU's."""
    if not bench.on_gpu:
        return None
    a = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=bench.device)
    b = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=bench.device)
    multiply: Callable[[], object] = lambda: a @ b  # noqa: E731
    for _ in range(3):
        multiply()
    return 2 * _SIDE**3 / statistics.median(bench.seconds(multiply) for _ in range(10))
