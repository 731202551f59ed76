"""Layer sampling written anew with plain torch, slowly and without any trick: what the library must agree with.

It knows of the library only which layers are active. It computes all gradients, always; each parameter has a torch
optimizer of its own, over the parameter, its fp32 master or its low-rank part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def signed(columns: Tensor) -> Tensor:
    """Singular vectors ``(k, rank)`` with signs of their own.

    An SVD gives either sign, by the last bit of its matrix, and the sign meets the moments of an earlier basis.
    """
    along = torch.linspace(1, 2, len(columns), dtype=columns.dtype).cos()  # at right angles to none of them
    return columns * torch.where(along @ columns < 0, -1.0, 1.0)


@dataclass
class Slot:
    """What the naive loop knows of one parameter."""

    weight: nn.Parameter
    master: nn.Parameter | None = None
    stepped: nn.Parameter | None = None
    optimizer: torch.optim.Optimizer | None = None
    basis: Tensor | None = None
    steps: int = 0


@dataclass
class Naive:
    """A model that is trained a few layers at a time.

    Args:
        model: The model.
        optimizer: Makes a torch optimizer of a list of parameters and further options.
        decay: Weight decay.
        decoupled: Whether the optimizer decays weights beside its update, as AdamW does.
        state: "drop" or "keep" (what is moved away is kept as well).
        masters: Whether weights train on fp32 masters.
        galore: Options of the projection: rank, scale, update_gap, rotate_moments; none for full rank.
    """

    model: nn.Module
    optimizer: Callable[..., torch.optim.Optimizer]
    decay: float
    decoupled: bool
    state: str
    masters: bool
    galore: dict[str, Any] | None
    last_norm: float | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    moving: dict[str, float] = field(default_factory=dict)
    signs: bool = False

    def __post_init__(self) -> None:
        for name, weight in self.model.named_parameters():
            self.slots[name] = Slot(weight)
            if self.masters:
                self.slots[name].master = nn.Parameter(weight.detach().float())

    def freeze(self, training: Collection[str]) -> None:
        """A period begins: what doesn't train from now on loses its basis, and its state where it is dropped."""
        for name, slot in self.slots.items():
            if name in training:
                continue
            slot.steps = 0
            if not (self.galore and self.galore["rotate_moments"] and self.state == "keep"):
                slot.basis = None
            if self.state == "drop":
                slot.optimizer = slot.stepped = None

    def move(self, names: Collection[str], rule: str, scale: float) -> None:
        """Have these move by their gradients alone from now on, at a learning rate that is scaled so."""
        rate = self._learning_rate()
        self.moving, self.signs = dict.fromkeys(names, rate * -scale), rule == "signsgd"

    def _learning_rate(self) -> float:
        rate: float = self.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
        return rate

    @torch.no_grad()
    def _move(self) -> None:
        for name, rate in self.moving.items():
            slot = self.slots[name]
            assert slot.weight.grad is not None
            gradient = slot.weight.grad.sign() if self.signs else slot.weight.grad
            exact = slot.weight if slot.master is None else slot.master
            exact.add_(gradient.to(exact.dtype), alpha=rate)
            if slot.master is not None:
                slot.weight.copy_(slot.master)
            slot.weight.grad = None

    def step(
        self,
        losses: Sequence[Callable[[], Tensor]],
        training: Collection[str],
        clip: tuple[str, float] | None,
    ) -> None:
        """One optimizer step: the gradients of all losses, clipped, of the parameters that train."""
        self.model.zero_grad()
        for loss in losses:
            loss().backward()  # type: ignore[no-untyped-call]
            self._move()
        held = {n: s.weight.grad for n, s in self.slots.items() if n in training}
        gradients = {n: g for n, g in held.items() if g is not None}
        self._clip(gradients, clip)
        for name, gradient in gradients.items():
            self._update(name, self.slots[name], gradient)
        self.model.zero_grad()

    def _clip(self, gradients: dict[str, Any], clip: tuple[str, float] | None) -> None:
        wide = {n: g if g.dtype == torch.float64 else g.float() for n, g in gradients.items()}
        norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in wide.items()}
        how, limit = clip or (None, 0.0)
        if how == "all":
            nn.utils.clip_grad_norm_([self.slots[name].weight for name in gradients], limit)
        for name, gradient in gradients.items():
            if how == "parameter":
                gradient.mul_((limit / (norms[name] + 1e-6)).clamp(max=1.0))
            elif how == "running" and self.last_norm is not None and self.last_norm > limit:
                gradient.mul_(limit / self.last_norm)
        if norms:
            self.last_norm = float(torch.stack(list(norms.values())).square().sum().sqrt())

    @torch.no_grad()
    def _update(self, name: str, slot: Slot, gradient: Tensor) -> None:
        weight = slot.weight if slot.master is None else slot.master
        gradient = gradient.to(weight.dtype)
        galore = self.galore
        if galore and ".layers." in name and weight.dim() == 2 and min(weight.shape) > galore["rank"]:
            self._update_low_rank(name, weight, gradient, galore)
        else:
            if slot.optimizer is None:
                slot.optimizer = self.optimizer([weight], weight_decay=self.decay)
            weight.grad = gradient
            self._set_rate(name, slot.optimizer)
            slot.optimizer.step()
            weight.grad = None
        if slot.master is not None:
            slot.weight.copy_(slot.master)

    def _set_rate(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = self._learning_rate() * self.factors.get(name, 1.0)

    def _update_low_rank(self, name: str, weight: Tensor, gradient: Tensor, galore: dict[str, Any]) -> None:
        slot, learning_rate = self.slots[name], self._learning_rate() * self.factors.get(name, 1.0)
        if not self.decoupled:
            gradient = gradient + self.decay * weight
        left = weight.shape[0] < weight.shape[1]  # the shorter side is projected
        turned = gradient if left else gradient.T
        if slot.steps % galore["update_gap"] == 0:
            u, _, _ = torch.linalg.svd(turned, full_matrices=False)
            new = signed(u[:, : galore["rank"]])
            if galore["rotate_moments"] and slot.basis is not None and slot.optimizer is not None:
                assert slot.stepped is not None
                moments = slot.optimizer.state[slot.stepped]
                turn = new.T @ slot.basis
                for key, matrix in (("exp_avg", turn), ("momentum_buffer", turn), ("exp_avg_sq", turn**2), ("square_avg", turn**2)):  # fmt: skip
                    if key in moments:
                        moments[key] = matrix @ moments[key]
            slot.basis = new
        assert slot.basis is not None
        if slot.optimizer is None:
            slot.stepped = nn.Parameter(turned.new_zeros(galore["rank"], turned.shape[1]))
            slot.optimizer = self.optimizer([slot.stepped], weight_decay=0.0)
        assert slot.stepped is not None
        slot.stepped.zero_()
        slot.stepped.grad = slot.basis.T @ turned
        self._set_rate(name, slot.optimizer)
        slot.optimizer.step()
        if self.decoupled:
            weight.mul_(1 - learning_rate * self.decay)
        update = galore["scale"] * (slot.basis @ slot.stepped)
        weight.add_(update if left else update.T)
        slot.steps += 1
