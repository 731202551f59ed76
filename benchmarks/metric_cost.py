"""What the layer metrics cost: alpha against weightwatcher, the outlier pass, measuring changed layers again.

Run as ``python -m layersample_benchmarks.metric_cost --model FOLDER``. All figures are CPU seconds of the
process, taken in turns within one run; a figure compares the smallest over
the rounds, because other processes only ever add (BLAS threads that wait for each other spin).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from layersample import find_layers
from layersample.config import BUILTIN_MODEL
from layersample.environment import describe_processor, environment
from layersample.layers.find import ModelLayers
from layersample.metrics import LayerMetrics, layer_metrics, outlier_ratios
from layersample.training.models import resolve_model

from .store import RESULTS

Record = dict[str, Any]

STEPS = 20  # training steps of a period
TIMED_STEPS = 3  # of which this many are run in each round
PACKAGES = ("torch", "numpy", "transformers", "weightwatcher", "threadpoolctl")


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure, print the table and write ``metric_cost.json`` and ``metric_cost.md``."""
    parser = argparse.ArgumentParser(prog="python -m layersample_benchmarks.metric_cost", description=__doc__)
    parser.add_argument(
        "--model", default=BUILTIN_MODEL, help="built-in name or folder (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each figure is taken (default 3)")
    parser.add_argument(
        "--batches", type=int, default=4, help="calibration batches of 4 x 256 tokens (default 4)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.rounds < 1 or options.batches < 1:
        parser.error("--rounds and --batches must be at least 1.")
    path = resolve_model(options.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    record = measure(model, options.rounds, options.batches)
    table = render(record)
    print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metric_cost.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.output / "metric_cost.md").write_text(table, encoding="utf-8")


def measure(model: PreTrainedModel, rounds: int, num_batches: int) -> Record:
    """Take every figure once a round, in turns, so that a slow spell of the machine meets them all."""
    layers = find_layers(model)
    middle = len(layers.layers) // 2
    changed = replace(layers, layers=layers.layers[middle - 1 : middle + 1])
    generator = torch.Generator().manual_seed(0)
    shape = (4, 256)
    batches = [_draw_tokens(model, shape, generator) for _ in range(num_batches)]
    # What is imported or set up at the first call isn't part of a figure.
    layer_metrics(model, changed, ("alpha",), backend="weightwatcher")
    outlier_ratios(model, [batch[:, :8] for batch in batches[:1]], layers)
    train = _Training(model, changed, _draw_tokens(model, (4, 128), generator))
    train.steps(1)
    calls: dict[str, Callable[[], Any]] = {
        "alphas_own": lambda: layer_metrics(model, layers, ("alpha",), cache=False),
        "alphas_weightwatcher": lambda: layer_metrics(model, layers, ("alpha",), backend="weightwatcher"),
        "alphas_weightwatcher_one_thread": lambda: _single_threaded(model, layers),
        "forward": lambda: _forward(model, batches),
        "forward_with_outliers": lambda: outlier_ratios(model, batches, layers),
        "two_layers_again": lambda: layer_metrics(model, changed, ("alpha",), cache=False),
        "training_steps": lambda: train.steps(TIMED_STEPS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    loads = []
    for _ in range(rounds):
        loads.append(os.getloadavg()[0])
        for name, call in calls.items():
            start = time.process_time()
            results[name] = call()
            seconds[name].append(time.process_time() - start)
    own: LayerMetrics = results["alphas_own"]
    return {
        "machine": _describe_machine(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "model": f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f}M parameters, "
        f"{len(layers.layers)} layers",
        "load_average": loads,
        "matrices": len(own.matrices),
        "calibration_tokens": num_batches * shape[0] * shape[1],
        "cpu_seconds": seconds,
        "max_alpha_difference": _compare(own, results["alphas_weightwatcher"]),
        "figures": _summarise(seconds),
    }


def render(record: Record) -> str:
    """The figures as a Markdown page."""
    figures = record["figures"]
    difference = record["max_alpha_difference"]
    speedup, overhead, share = figures["speedup"], figures["outlier_overhead"], figures["again_share"]
    one_thread = figures["speedup_one_thread"]
    rows = [
        ("alphas: weightwatcher's default / ours", f"{speedup:.1f} x", "at least 12 x", speedup >= 12),
        ("alphas: weightwatcher on one BLAS thread / ours", f"{one_thread:.1f} x", "", None),
        ("largest difference in alpha", f"{difference:.1e}", "at most 1e-6", difference <= 1e-6),
        ("outlier pass over the calibration forward", f"{overhead:+.1%}", "at most 10%", overhead <= 0.10),
        (f"2 changed layers again / {STEPS} training steps", f"{share:.2%}", "at most 0.5%", share <= 0.005),
    ]
    seconds, loads = record["cpu_seconds"], record["load_average"]
    versions = ", ".join(f"{name} {found}" for name, found in record["versions"].items())
    lines = [
        "# Cost of the layer metrics",
        "",
        f"{record['model']}; {record['matrices']} matrices; {record['calibration_tokens']} calibration "
        f"tokens. {record['machine']}. {versions}.",
        "",
        "CPU seconds of the process, all threads; figures are ratios of the smallest over rounds taken in "
        f"turns. Load average from {min(loads):.1f} to {max(loads):.1f}: on a "
        "busy machine weightwatcher's default, of several BLAS threads that spin, is overrated.",
        "",
        "| figure | measured | must hold | holds |",
        "|---|---|---|---|",
        *(f"| {what} | {value} | {bound} | {_tell(holds)} |" for what, value, bound, holds in rows),
        "",
        "| CPU seconds | smallest | each round |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | {min(taken):.2f} | "
            f"{', '.join(f'{value:.2f}' for value in taken)} |"
            for name, taken in seconds.items()
        ),
        "",
        f"Training steps: {TIMED_STEPS} a round, 4 x 128 tokens, two middle layers trained by AdamW.",
    ]
    return "\n".join(lines) + "\n"


def _tell(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "**no**"


def _summarise(seconds: dict[str, list[float]]) -> dict[str, float]:
    least = {name: min(taken) for name, taken in seconds.items()}
    return {
        "speedup": least["alphas_weightwatcher"] / least["alphas_own"],
        "speedup_one_thread": least["alphas_weightwatcher_one_thread"] / least["alphas_own"],
        "outlier_overhead": least["forward_with_outliers"] / least["forward"] - 1.0,
        "again_share": least["two_layers_again"] / (least["training_steps"] / TIMED_STEPS * STEPS),
    }


def _compare(own: LayerMetrics, reference: LayerMetrics) -> float:
    pairs = zip(own.matrices, reference.matrices, strict=True)
    return max(abs(ours.values["alpha"] - theirs.values["alpha"]) for ours, theirs in pairs)


def _single_threaded(model: PreTrainedModel, layers: ModelLayers) -> LayerMetrics:
    with threadpool_limits(1):
        return layer_metrics(model, layers, ("alpha",), backend="weightwatcher")


def _forward(model: nn.Module, batches: list[Tensor]) -> None:
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train(training)


def _draw_tokens(model: PreTrainedModel, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random tokens: what a pass costs doesn't depend on what it reads."""
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


class _Training:
    """Steps of AdamW on a few layers. The learning rate is 0: the weights to measure stay as they are."""

    def __init__(self, model: PreTrainedModel, layers: ModelLayers, tokens: Tensor) -> None:
        self._model, self._tokens = model, tokens
        active = {name for layer in layers.layers for name in layer.parameters}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in active)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._model(self._tokens, labels=self._tokens).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()


def _describe_machine() -> str:
    return f"{describe_processor(environment())}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
