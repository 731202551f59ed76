"""Random schedules, each trained by the library and by the naive loop."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layersample import Checkpoints, LayerScheduler, Projection, ProjectionContext, StepInBackward
from layersample.registry import create_projection
from tests.helpers import make_batch, make_llama
from tests.torture.naive import Naive, signed

SAMPLERS: dict[str, dict[str, Any]] = {
    "lisa": {},
    "cyclic": {},
    "full": {},
    "prior": {"weights": "increase"},
    "owlore": {"metric": "hill"},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
}
GROUPS = {"embeddings": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}


@dataclass(kw_only=True, eq=False)
class SignedGaLore(Projection):
    """GaLore by an SVD whose vectors have signs that don't hang on the last bit of a gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._galore = create_projection("galore", {"rank": self.rank, "basis": "svd"})

    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        """Choose it."""
        return signed(self._galore.basis(gradient, None, context)) if previous is None else previous


def draw(seed: int, index: int) -> dict[str, Any]:
    """A random schedule; the same for the same numbers."""
    rng = random.Random(f"schedule {seed} {index}")
    masters = rng.random() < 0.4
    galore = {
        "rank": rng.choice((2, 4, 7)),
        "scale": rng.choice((0.25, 1.0)),
        "update_gap": rng.choice((1, 2, 3, 200)),
        "rotate_moments": rng.random() < 0.3,
    }
    layers, backward = rng.randint(2, 5), rng.random() < 0.4
    clip = rng.choice((None, "parameter", "running") if backward else (None, "all"))
    if masters and clip == "running":
        clip = (
            None  # the order in which norms are added up shows in the last bit of a bf16 gradient, and grows
        )
    steps = rng.randint(3, 10)
    return {
        "layers": layers,
        "sampler": rng.choice(list(SAMPLERS)),
        "num_active": rng.randint(1, layers),
        "period": rng.randint(1, 4),
        "seed": rng.randrange(1000),
        "state": rng.choice(("drop", "keep", "offload")),
        "rules": {group: rng.choice(("train", "freeze", "sample")) for group in GROUPS},
        "optimizer": rng.choice(list(OPTIMIZERS)),
        "decay": rng.choice((0.0, 0.1)),
        "galore": galore if not masters and rng.random() < 0.5 else None,
        "masters": masters,
        "accumulate": rng.choice((1, 1, 2, 3)),
        "backward": backward,
        "clip": None if clip is None else (clip, rng.choice((0.1, 1.0))),
        "steps": steps,
        "resumed_at": rng.randint(1, steps - 1) if rng.random() < 0.3 else None,
    }


def batches(case: dict[str, Any], step: int) -> list[dict[str, Tensor]]:
    """The batches of a step: one a backward pass."""
    return [make_batch(1000 * step + i) for i in range(case["accumulate"])]


class Library:
    """The schedule as a user of the library writes it."""

    def __init__(self, case: dict[str, Any], folder: str) -> None:
        self.case = case
        self.model = build(case)
        self.optimizer = OPTIMIZERS[case["optimizer"]](self.model.parameters(), weight_decay=case["decay"])
        backward = None
        if case["backward"]:
            how: Any
            how, limit = case["clip"] or ("running", None)
            backward = StepInBackward(accumulation=case["accumulate"], max_norm=limit, clip_by=how)
        self.scheduler = LayerScheduler(
            self.model,
            self.optimizer,
            case["sampler"],
            sampler_options=SAMPLERS[case["sampler"]],
            num_active=case["num_active"],
            period=case["period"],
            seed=case["seed"],
            state=case["state"],
            projection=SignedGaLore(**case["galore"]) if case["galore"] else None,
            step_in_backward=backward or False,
            **case["rules"],
        )
        kept: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.checkpoints = Checkpoints(folder, kept)

    def step(self, step: int) -> None:
        for batch in batches(self.case, step):
            (self.model(**batch).loss / self.case["accumulate"]).backward()
        if self.case["clip"] and not self.case["backward"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case["clip"][1])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def build(case: dict[str, Any]) -> Any:
    """The model: bf16 where it has masters, else fp64, in which only rounding is left to differ."""
    return make_llama(case["layers"], dtype=torch.bfloat16 if case["masters"] else torch.float64)


def training_names(library: Library) -> set[str]:
    """Which parameters train now, by the rules and the names of the active layers alone."""
    rules = library.case["rules"]
    active = {GROUPS.get(name, f"{name}.") for name in library.scheduler.active_layers}
    names = set()
    for name, _ in library.model.named_parameters():
        always = any(name.startswith(part) for group, part in GROUPS.items() if rules[group] == "train")
        if always or name.startswith(tuple(active)):
            names.add(name)
    return names


def run(case: dict[str, Any]) -> str | None:
    """Train by both; say where they differ, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        library = Library(case, folder)
        model = build(case)
        naive = Naive(
            model,
            OPTIMIZERS[case["optimizer"]],
            decay=case["decay"],
            decoupled=case["optimizer"] == "adamw",
            state="drop" if case["state"] == "drop" else "keep",
            masters=case["masters"],
            galore=case["galore"],
        )
        for step in range(case["steps"]):
            training = training_names(library)
            if step % case["period"] == 0:
                naive.freeze(training)
            losses = [
                partial(lambda batch: model(**batch).loss / case["accumulate"], batch)
                for batch in batches(case, step)
            ]
            naive.step(losses, training, case["clip"])
            library.step(step)
            if step + 1 == case["resumed_at"]:
                library.checkpoints.save(step + 1)
                library.scheduler.close()
                library = Library(case, folder)
                assert library.checkpoints.load_last() == step + 1
        return _difference(case, library, naive)


def _difference(case: dict[str, Any], library: Library, naive: Naive) -> str | None:
    exact = library.scheduler.fp32_state_dict() if case["masters"] else None
    # Masters agree to the bit; singular vectors of values that are close turn by rounding.
    tolerance = 0.0 if case["masters"] else 1e-6 if case["galore"] else 1e-10
    for name, parameter in library.model.named_parameters():
        slot = naive.slots[name]
        mine, theirs = parameter.detach(), slot.weight.detach()
        if exact is not None:
            assert slot.master is not None
            mine, theirs = exact[name], slot.master.detach()
        if not torch.isfinite(mine).all() or not torch.allclose(mine, theirs, rtol=0, atol=tolerance):
            return f"{name} differs by {float((mine - theirs).abs().max()):.3g}"
    return None
