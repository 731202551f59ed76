"""Random schedules, each trained by the library and by the naive loop."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layersample import Checkpoints, LayerScheduler, Projection, ProjectionContext, StepInBackward
from layersample.registry import create_projection
from tests.helpers import make_batch, make_llama
from tests.torture.naive import Naive, signed
from tests.torture.samplers import ADAPTIVE, FIXED, least_period

SAMPLERS: dict[str, dict[str, Any]] = {**FIXED, "owlore": {"metric": "hill"}, **ADAPTIVE}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
}
INACTIVE_SCALE = 0.1
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
    sampler, inactive = rng.choice(list(SAMPLERS)), rng.choice(("freeze", "freeze", "sgd", "signsgd"))
    accumulate = 1 if inactive == "signsgd" else rng.choice((1, 1, 2, 3))
    return {
        "layers": layers,
        "granularity": rng.choice(("layer", "layer", "block", "module", "tensor")),
        "inactive": inactive,
        "scope": "all" if inactive == "freeze" else rng.choice(("all", "above")),
        "warmup": rng.choice((0, 0, 1, 3)),
        "sampler": sampler,
        "num_active": rng.randint(1, layers),
        "period": max(rng.randint(1, 4), least_period(sampler)),
        "seed": rng.randrange(1000),
        "state": rng.choice(("drop", "keep", "offload")),
        "rules": {group: rng.choice(("train", "freeze", "sample")) for group in GROUPS},
        "optimizer": rng.choice(list(OPTIMIZERS)),
        "decay": rng.choice((0.0, 0.1)),
        "galore": galore if not masters and rng.random() < 0.5 else None,
        "masters": masters,
        "accumulate": accumulate,
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
            granularity=case["granularity"],
            inactive=case["inactive"],
            inactive_lr_scale=INACTIVE_SCALE if case["inactive"] != "freeze" else 5.0,
            inactive_scope=case["scope"],
            switch_warmup=case["warmup"],
            **case["rules"],
        )
        kept: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.checkpoints = Checkpoints(folder, kept)

    def step(self, step: int) -> None:
        told = torch.zeros(())
        for batch in batches(self.case, step):
            loss = self.model(**batch).loss / self.case["accumulate"]
            loss.backward()
            told = told + loss.detach()
        if self.case["clip"] and not self.case["backward"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case["clip"][1])
        self.optimizer.step()
        self.scheduler.step(loss=told)
        self.optimizer.zero_grad()


def build(case: dict[str, Any]) -> Any:
    """The model: bf16 where it has masters, else fp64, in which only rounding is left to differ."""
    return make_llama(case["layers"], dtype=torch.bfloat16 if case["masters"] else torch.float64)


@dataclass
class Now:
    """What each parameter does in a step, by the rules and the names of what is active.

    Args:
        training: Parameters that train.
        moving: Those that move without state.
        entered: Those that train since this period, and didn't in the one before.
    """

    training: set[str]
    moving: set[str]
    entered: set[str]


def names_of(library: Library, active: Collection[int]) -> set[str]:
    """Parameters of sampled units, by their indices: of whole layers by their names, of parts as they are listed."""
    found: set[str] = set()
    for index in active:
        name = library.scheduler.layers[index]
        if library.case["granularity"] == "layer" or name in GROUPS:
            part = GROUPS.get(name, f"{name}.")
            found |= {other for other, _ in library.model.named_parameters() if other.startswith(part)}
        else:
            found |= set(library.scheduler._units.sampled[index].parameters)
    return found


def now(library: Library, before: Collection[int] | None) -> Now:
    """What each parameter does now.

    Args:
        library: The library's side.
        before: Indices that were active in the period before; none in the first.
    """
    rules, active = library.case["rules"], library.scheduler.active
    always = tuple(part for group, part in GROUPS.items() if rules[group] == "train")
    training = names_of(library, active)
    training |= {name for name, _ in library.model.named_parameters() if name.startswith(always)}
    others: Collection[int] = (
        [] if library.case["inactive"] == "freeze" else range(len(library.scheduler.layers))
    )
    if library.case["scope"] == "above":
        others = [index for index in others if active and index > min(active)]
    moving = names_of(library, others) - training
    new = [] if before is None else [index for index in active if index not in before]
    return Now(training, moving, names_of(library, new))


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
        period, began, before, active = -1, 0, None, None
        for step in range(case["steps"]):
            if library.scheduler.round != period:
                period, began, before = library.scheduler.round, step, active
                active = tuple(library.scheduler.active)
                doing = now(library, before)
                naive.freeze(doing.training)
                naive.move(doing.moving, case["inactive"], INACTIVE_SCALE)
            warm = min(1.0, (step - began + 1) / case["warmup"]) if case["warmup"] else 1.0
            naive.factors = dict.fromkeys(doing.entered, warm)
            losses = [
                partial(lambda batch: model(**batch).loss / case["accumulate"], batch)
                for batch in batches(case, step)
            ]
            naive.step(losses, doing.training, case["clip"])
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
