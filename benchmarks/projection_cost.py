"""What a low-rank projection costs and keeps, on real gradients: each basis, a whole step, and galore-torch beside it.

``python -m layersample_benchmarks.projection_cost``; for the comparison, ``pip install --no-deps galore-torch==1.0``
first. CPU seconds of the process, on one thread by default: threads that wait for each other spin.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from layersample import LayerScheduler, Projection, ProjectionContext, create_projection, find_layers
from layersample.projection.bases import random_basis, randomized_basis, subspace_basis, svd_basis
from layersample.training.models import load_model

from .step_cost import Fixed
from .store import RESULTS, store
from .timed import TimedRun, ratios, real_batches

RANK = 128
LAYERS = (9, 20)
Basis = Callable[
    [Tensor, Tensor, Tensor, torch.Generator], Tensor
]  # gradient, last basis, one of 3 steps ago

BASES: dict[str, Basis] = {
    "SVD": lambda g, last, old, rng: svd_basis(g, RANK),
    "SVD of another batch, 3 steps ago": lambda g, last, old, rng: old,
    "randomized, from nothing": lambda g, last, old, rng: randomized_basis(g, RANK, rng),
    "subspace, from the last step": lambda g, last, old, rng: subspace_basis(g, last),
    "random": lambda g, last, old, rng: random_basis((g.shape[0], RANK), rng, g),
}


def turned(gradient: Tensor) -> Tensor:
    """A gradient with its shorter side first, as ``side="std"`` takes it."""
    return gradient if gradient.shape[0] < gradient.shape[1] else gradient.T


def lost(gradient: Tensor, basis: Tensor) -> float:
    """Relative norm of what a basis leaves out, ‖G − PPᵀG‖ / ‖G‖."""
    return float((gradient - basis @ (basis.T @ gradient)).norm() / gradient.norm())


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all matrices of all layers."""
    names = {name for layer in find_layers(model).layers for name in layer.parameters}
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name: turned(p.grad.clone())
        for name, p in model.named_parameters()
        if name in names and p.dim() == 2 and p.grad is not None
    }


def measure_bases(folder: str, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """CPU seconds and lost energy of each basis over all matrices, at the fourth step of a training run."""
    model, _ = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    history = []
    for batch in batches[:4]:
        history.append(gradients(model, batch))
        optimizer.step()
    old = {name: svd_basis(g, RANK) for name, g in history[0].items()}
    last = {name: svd_basis(g, RANK) for name, g in history[2].items()}
    rows: list[dict[str, Any]] = []
    for title, basis in BASES.items():
        generator = torch.Generator().manual_seed(0)
        seconds, errors = 0.0, []
        for name, gradient in history[3].items():
            started = time.process_time()
            found = basis(gradient, last[name], old[name], generator)
            seconds += time.process_time() - started
            errors.append(lost(gradient, found))
        rows.append({"basis": title, "cpu_seconds": seconds, "lost": statistics.mean(errors)})
    for row in rows:
        row["svd_over_this"] = rows[0]["cpu_seconds"] / max(row["cpu_seconds"], 1e-9)
    return rows


class Watched(Projection):
    """Another projection, whose errors are noted."""

    def __init__(self, inner: Projection) -> None:
        super().__init__(rank=inner.rank, scale=inner.scale, update_gap=inner.update_gap, side=inner.side)
        self.inner, self.errors = inner, list[float]()

    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        """Let the other choose, and note how much it leaves out."""
        found = self.inner.basis(gradient, previous, context)
        self.errors.append(lost(gradient, found))
        return found


def make_run(folder: str, projection: Projection | None) -> TimedRun:
    """Load the model and build what trains two of its layers, with or without a projection."""
    model, _ = load_model(folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = LayerScheduler(
        model, optimizer, Fixed(layers=LAYERS), embeddings="freeze", projection=projection, period=10**6
    )
    return TimedRun(model, optimizer, scheduler)


def trained_matrices(run: TimedRun) -> list[nn.Parameter]:
    """The matrices of the active layers."""
    return [p for p in run.model.parameters() if p.requires_grad and p.dim() == 2]


def measure_steps(folder: str, batches: list[dict[str, Tensor]], rounds: int) -> dict[str, Any]:
    """The projection's share of a step on two active layers, and its error at every step."""
    plain, projected = (
        make_run(folder, None),
        make_run(folder, create_projection("galore", {"rank": RANK})),
    )
    for i in range(rounds + 2):
        for runner in (plain, projected):
            runner.step(batches[i % len(batches)])
    skip = 2  # the first step makes state, and a basis from nothing
    errors = {}
    for title, options in {
        "default": {},
        "GaLore as published (SVD every 200 steps)": {"basis": "svd"},
    }.items():
        watched = Watched(create_projection("galore", {"rank": RANK, **options}))
        runner = make_run(folder, watched)
        for batch in batches[:10]:
            runner.step(batch)
        size = len(watched.errors) // 10
        errors[title] = [
            statistics.mean(watched.errors[i * size : (i + 1) * size])
            for i in range(len(watched.errors) // size)
        ]
    matrices = trained_matrices(projected)
    state = [value for p in matrices for value in projected.optimizer.state[p].values()]
    return {
        "layers": LAYERS,
        "overhead": statistics.median(ratios(projected.cpu_seconds[skip:], plain.cpu_seconds[skip:])) - 1,
        "error_by_step": errors,
        "state_elements": sum(value.numel() for value in state if value.dim() > 0),
        "state_elements_formula": sum(2 * RANK * max(p.shape) + RANK * min(p.shape) for p in matrices),
    }


def compare_with_galore_torch(folder: str, batches: list[dict[str, Tensor]]) -> dict[str, Any] | None:
    """Train the whole model both ways, through a refresh of the basis; ``None`` where galore-torch isn't installed."""
    if find_spec("galore_torch") is None:
        return None
    # It imports bitsandbytes for an 8-bit optimizer that isn't used here.
    stub = ModuleType("bitsandbytes.optim.optimizer")
    stub.Optimizer2State = object  # type: ignore[attr-defined]
    names = ("bitsandbytes", "bitsandbytes.optim", stub.__name__)
    sys.modules.update(dict.fromkeys(names, stub))
    from galore_torch import GaLoreAdamW

    same = _train_both(GaLoreAdamW, folder, batches, same_gradients=True)
    own = _train_both(GaLoreAdamW, folder, batches, same_gradients=False)
    return {**own, "difference_over_update": same["difference_over_update"]}


def _train_both(
    theirs_class: Any, folder: str, batches: list[dict[str, Tensor]], *, same_gradients: bool
) -> dict[str, Any]:
    gap, steps, lr, eps, scale = 3, 5, 1e-4, 1e-6, 0.25
    ours, _ = load_model(folder)
    theirs, _ = load_model(folder)
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=lr, weight_decay=0.0)
    options = {"rank": RANK, "basis": "svd", "update_gap": gap, "scale": scale}
    scheduler = LayerScheduler(
        ours, optimizer, "full", num_active=1, projection="galore", projection_options=options
    )
    projected = [p for name, p in theirs.named_parameters() if name in scheduler.projected]
    others = [p for name, p in theirs.named_parameters() if name not in scheduler.projected]
    low_rank = {"params": projected, "rank": RANK, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    reference = theirs_class([{"params": others}, low_rank], lr=lr, eps=eps, no_deprecation_warning=True)
    losses: dict[str, list[float]] = {"ours": [], "galore-torch": []}
    for step, batch in enumerate(batches[:steps], start=1):
        for title, model in (("ours", ours), ("galore-torch", theirs)):
            loss = model(**batch).loss
            loss.backward()
            losses[title].append(loss.item())
        if same_gradients:
            for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
        for (
            group
        ) in optimizer.param_groups:  # galore-torch adds eps before it corrects the bias, torch after it
            group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** step)
        for stepper in (optimizer, reference):
            stepper.step()
            stepper.zero_grad()
        scheduler.step()
    reached = dict(theirs.named_parameters())
    moved = {name: (p.detach() - start[name]).norm() for name, p in ours.named_parameters()}
    apart = {name: (p.detach() - reached[name].detach()).norm() for name, p in ours.named_parameters()}
    return {
        "steps": steps,
        "update_gap": gap,
        "losses": losses,
        "difference_over_update": float(max(apart[n] / moved[n] for n in scheduler.projected)),
    }


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps with and without the projection.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print the tables, and store them."""
    torch.set_num_threads(threads)
    batches = real_batches(model)
    bases = measure_bases(model, batches)
    result: dict[str, Any] = {
        "rank": RANK,
        "rounds": rounds,
        "bases": bases,
        "steps": measure_steps(model, batches, rounds),
        "galore_torch": compare_with_galore_torch(model, batches),
    }
    store(
        output,
        "projection_cost",
        result,
        title="What a low-rank projection costs and keeps",
        about=f"SmolLM2-135M, fp32, real text in batches of 4 × 128 tokens, rank {RANK}, real gradients.",
        command=f"projection_cost --rounds {rounds} --threads {threads}",
        headings=("basis of all 210 matrices", "CPU seconds", "SVD over this", "lost of the gradient"),
        rows=[
            [
                row["basis"],
                f"{row['cpu_seconds']:.2f}",
                f"{row['svd_over_this']:.1f}" if row["cpu_seconds"] > 0.01 else "",
                f"{row['lost']:.3f}",
            ]
            for row in bases
        ],
        notes=sentences(result),
    )


def sentences(result: dict[str, Any]) -> list[str]:
    """What was measured beside the table."""
    steps, compared = result["steps"], result["galore_torch"]
    text = [
        f"`galore` on 2 active layers: steps are {steps['overhead']:.1%} longer (median of {result['rounds']} pairs).",
        *(
            f"Lost of the gradient in 10 steps of training, {title}: {min(e):.3f} to {max(e):.3f}."
            for title, e in steps["error_by_step"].items()
        ),
        f"Optimizer state of the projected matrices: {steps['state_elements']:,} elements; the formula "
        f"2·r·n + m·r says {steps['state_elements_formula']:,}.",
    ]
    if compared:
        text.append(
            f"Against galore-torch 1.0, `full` with `basis='svd'`, {compared['steps']} steps, a new basis every "
            f"{compared['update_gap']}: given the same gradients, a matrix differs by at most "
            f"{compared['difference_over_update']:.1e} of its update; each with gradients of its own, losses are "
            f"{' '.join(f'{x:.6f}' for x in compared['losses']['ours'])} and "
            f"{' '.join(f'{x:.6f}' for x in compared['losses']['galore-torch'])}."
        )
    return text


if __name__ == "__main__":
    typer.run(main)
