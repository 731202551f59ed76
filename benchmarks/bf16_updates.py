"""How much of an update survives in bf16 weights, and what exact fp32 masters cost.

``python -m layersample_benchmarks.bf16_updates``: the same steps in plain bf16, in bf16 with masters that are rounded
away at each switch (as BAdam does), and in bf16 with exact masters; then step times, taken in turns.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from layersample import LayerScheduler
from layersample.optim.masters import AT_REST
from layersample.training.models import load_model

from .step_cost import Fixed
from .store import RESULTS, store
from .timed import TimedRun, ratios, real_batches

METHODS = ("plain bf16", "rounded at each switch", "exact masters")
PERIODS = 10


def make_run(method: str, folder: str, learning_rate: float, sampler: Any, **options: Any) -> TimedRun:
    """Load the model in bf16 and build what trains it; options are the scheduler's."""
    model, _ = load_model(folder, torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    masters = method != METHODS[0]
    return TimedRun(
        model, optimizer, LayerScheduler(model, optimizer, sampler, master_weights=masters, **options)
    )


def round_away(optimizer: torch.optim.Optimizer) -> None:
    """Forget what frozen weights have beyond bf16."""
    for state in optimizer.state.values():
        for key in AT_REST:
            state.pop(key, None)


def measure_survival(
    folder: str, batches: list[dict[str, Tensor]], period: int, rate: float
) -> list[dict[str, Any]]:
    """Train every method for the same periods; a method's update is compared with the exact one."""
    start = {n: p.detach().float() for n, p in load_model(folder, torch.bfloat16)[0].named_parameters()}
    changes: dict[str, dict[str, Tensor]] = {}
    for method in METHODS:
        run = make_run(method, folder, rate, "lisa", num_active=2, period=period, embeddings="freeze")
        for i in range(PERIODS * period):
            run.step(batches[i % len(batches)])
            if method == METHODS[1]:
                round_away(run.optimizer)
        assert run.scheduler is not None
        reached = run.scheduler.fp32_state_dict()
        changes[method] = {n: reached[n] - value for n, value in start.items()}
    exact = changes[METHODS[-1]]
    trained = [name for name, change in exact.items() if change.any()]
    total = sum(float(exact[name].square().sum()) for name in trained)
    numel = sum(exact[name].numel() for name in trained)
    return [
        {
            "method": method,
            "weights_changed": sum(int(change[name].count_nonzero()) for name in trained) / numel,
            "update_kept": sum(float((change[name] * exact[name]).sum()) for name in trained) / total,
        }
        for method, change in changes.items()
    ]


def measure_steps(folder: str, batches: list[dict[str, Tensor]], rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of a step with exact masters over one in plain bf16, in turns."""
    rows = []
    for title, sampler, options in (
        ("layers 9 and 20", Fixed(layers=(9, 20)), {"embeddings": "freeze", "period": 10**6}),
        ("lisa, a switch after every step", "lisa", {"period": 1}),
    ):
        plain, exact = (
            make_run(method, folder, 1e-5, sampler, **options) for method in (METHODS[0], METHODS[-1])
        )
        for i in range(rounds + 2):
            for run in (plain, exact):
                run.step(batches[i % len(batches)])
        rows.append(
            {
                "what": title,
                "exact_over_plain": statistics.median(ratios(exact.cpu_seconds[2:], plain.cpu_seconds[2:])),
                "plain_cpu_seconds": statistics.median(plain.cpu_seconds[2:]),
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder.")] = "smollm2-135m",
    period: Annotated[int, typer.Option(min=1, help="Optimizer steps of each of the 10 periods.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.")] = 1e-5,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each method.")] = 12,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print the tables, and store them."""
    batches = real_batches(model)
    survival = measure_survival(model, batches, period, learning_rate)
    steps = measure_steps(model, batches, rounds)
    store(
        output,
        "bf16_updates",
        {
            "period": period,
            "learning_rate": learning_rate,
            "rounds": rounds,
            "survival": survival,
            "steps": steps,
        },
        title="What is left of an update in bf16",
        about=f"SmolLM2-135M in bf16, `lisa` with 2 layers, {PERIODS} periods of {period} steps, AdamW at "
        f"{learning_rate:g}, 4 × 128 tokens of real text; of the weights of the layers that trained.",
        command=f"bf16_updates --period {period} --rounds {rounds}",
        headings=("bf16 weights", "weights changed", "of the exact update"),
        rows=[
            [row["method"], f"{row['weights_changed']:.1%}", f"{row['update_kept']:.1%}"] for row in survival
        ],
        notes=[
            f"A step with exact masters over one in plain bf16, {row['what']}: {row['exact_over_plain']:.3f} "
            f"(median of {rounds} pairs)."
            for row in steps
        ],
    )


if __name__ == "__main__":
    typer.run(main)
