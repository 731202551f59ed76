"""What a low-rank projection is: one method that chooses the basis of a gradient, and options that all share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from layersample.projection.bases import add_product

Side = Literal["std", "reverse_std", "left", "right"]
_TINY = 1e-30


@dataclass(frozen=True)
class ProjectionContext:
    """What a projection may know of the parameter whose basis it chooses.

    Args:
        name: The parameter's name in the model.
        steps: Optimizer steps that the parameter has done since it was activated; 0 at the first.
        seed: The user's seed; every rank has the same.
        turned: Whether the weight's own gradient is the transpose of the one to find a basis of.
    """

    name: str
    steps: int
    seed: int = 0
    turned: bool = False

    def generator(self) -> torch.Generator:
        """The only randomness allowed: on the CPU, fresh for each parameter and step."""
        digest = hashlib.sha256(f"layersample:{self.seed}:{self.name}:{self.steps}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class LowRankStep:
    """What an optimizer has made of one projected gradient. Matrices may have a leading batch dimension.

    Args:
        whole_gradient: Gives :attr:`gradient`; it isn't kept in memory during the optimizer's step.
        basis: P, ``(k, rank)``.
        low_rank_gradient: R = PᵀG, ``(rank, n)``, which the optimizer got.
        change: What the optimizer added to a parameter of that shape, ``(rank, n)``: about -lr · Adam(R).
        learning_rate: Learning rate of the parameter's group.
        descends: Whether the optimizer goes against the gradient (``maximize=False``).
        state: Tensors that this parameter keeps until its next step; they are part of checkpoints.
    """

    whole_gradient: Callable[[], Tensor]
    basis: Tensor
    low_rank_gradient: Tensor
    change: Tensor
    learning_rate: float
    descends: bool
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gradient(self) -> Tensor:
        """The whole gradient G, ``(k, n)``, turned so that the basis acts on its first dimension. Don't change it."""
        return self.whole_gradient()

    def scale_gradient(self, gradient: Tensor, *, max_growth: float, per_channel: bool = True) -> Tensor:
        """Turn a full-rank gradient into an update as the optimizer has turned the projected one.

        Args:
            gradient: Matrix ``(k, n)``; it is overwritten.
            max_growth: How many times its norm of the step before the update may have, learning rates aside.
            per_channel: Whether each column is scaled by its own ‖change‖/‖low_rank_gradient‖, or all by one.

        Returns:
            What is to be added to the weight, ``(k, n)``.

        References:
            Fira, arXiv 2410.01623 (the limit too), and APOLLO, arXiv 2412.05270.
        """
        dim = -2 if per_channel else (-2, -1)
        before = torch.linalg.vector_norm(self.low_rank_gradient, dim=dim, keepdim=True)
        after = torch.linalg.vector_norm(self.change, dim=dim, keepdim=True)
        update = gradient.mul_(after / before.clamp_min(_TINY))
        norm = torch.linalg.vector_norm(update) / max(self.learning_rate, _TINY)
        last = self.state.get("update_norm")
        if last is not None:
            allowed = torch.minimum(norm, max_growth * last.to(norm))
            # A norm of zero leaves nothing to compare with.
            shrink = torch.where(allowed > 0, allowed / norm.clamp_min(_TINY), torch.ones_like(norm))
            update.mul_(shrink)
            norm = norm * shrink
        self.state["update_norm"] = norm
        return update.neg_() if self.descends else update


@dataclass(kw_only=True, eq=False)
class Projection(ABC):
    """Projects gradients to a low rank, in which the optimizer keeps its state.

    Subclass it, write :meth:`basis`, and ``@register_projection`` a name. :meth:`apply` may be written too,
    where an update is more than the projected one. Options of its own are the fields of a keyword-only dataclass,
    ``@dataclass(kw_only=True, eq=False)``, checked in ``__post_init__``, beside those that all share; or arguments of
    an ``__init__`` of its own.

    Args:
        rank: Dimensions that are left of each matrix's shorter side. One whose shorter side is no longer than
            this is trained at full rank.
        scale: Factor on the update.
        update_gap: Steps of a parameter between two new bases (T).
        side: Which side is projected: ``"std"`` the shorter one, ``"reverse_std"`` the longer one, or
            ``"left"`` (rows) or ``"right"`` (columns) of every matrix.
        rotate_moments: Whether the optimizer's moments follow the basis when it changes (LDAdam, arXiv
            2410.16103) or stay as they are, as in GaLore.
        targets: Which weights are projected: parts of their names, such as ``"mlp"`` or ``"self_attn.q_proj"``.
            By default the matrices of all layers, and not the embeddings and the head.

    Raises:
        ValueError: If an option is out of bounds.
    """

    source: ClassVar[str] = ""
    """Where the rule comes from: an arXiv id or a repository."""

    takes_16_bits: ClassVar[bool] = False
    """Whether :meth:`basis` can do with a 16-bit gradient as it is, which spares a float32 copy of it."""

    rank: int = 128
    scale: float = 1.0
    update_gap: int = 200
    side: Side = "std"
    rotate_moments: bool = False
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but got rank={self.rank}.")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, but got scale={self.scale}.")
        if self.update_gap < 1:
            raise ValueError(
                f"update_gap must be at least 1 optimizer step, but got update_gap={self.update_gap}."
            )
        if self.side not in get_args(Side):
            raise ValueError(f"side must be one of {', '.join(get_args(Side))}, but got {self.side!r}.")
        if isinstance(self.targets, str):
            raise ValueError(f"targets must be a list of names, but got the text {self.targets!r}.")
        self.targets = None if self.targets is None else tuple(self.targets)

    @abstractmethod
    def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
        """Choose the basis for one step.

        Args:
            gradient: Finite, float32 or float64 (or of 16 bits, where :attr:`takes_16_bits` is set), ``(k, n)``
                or ``(batch, k, n)``, turned so that the basis acts on its first dimension.
            previous: The basis of the step before; ``None`` where a new one is due: at a parameter's first
                step since it was activated, and every ``update_gap`` steps after it.
            context: What is known of the parameter.

        Returns:
            ``(k, rank)``, or a batch of them, in float32 or float64; ``previous`` itself where it stays.
        """

    def apply(self, weight: Tensor, step: LowRankStep) -> None:
        """Change a weight ``(k, n)`` in place by what the optimizer did at low rank.

        By default W += scale · P · change.
        """
        add_product(weight, step.basis, step.change, self.scale)

    @staticmethod
    def check_growth(max_growth: float) -> None:
        """Make sure that a limit of :meth:`LowRankStep.scale_gradient` lets updates grow.

        Raises:
            ValueError: If it isn't above 1.
        """
        if not max_growth > 1:
            raise ValueError(f"max_growth must be above 1, but got max_growth={max_growth}.")

    def is_left(self, shape: Sequence[int]) -> bool:
        """Whether the rows of a matrix of this shape ``(..., m, n)`` are projected, and not its columns."""
        rows, columns = shape[-2:]
        shorter = rows < columns
        return {"std": shorter, "reverse_std": not shorter, "left": True, "right": False}[self.side]
