"""How far the weights of active layers move in a period, for samplers that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layersample.optim.masters import combine
from layersample.optim.optimizers import Optimizers
from layersample.parallel.base import Engine
from layersample.unwrapping import local_part


class WeightChanges:
    """Compares the weights of active layers at the end of a period with copies from its beginning.

    The copies are in the host's memory: exact values, 4 bytes for an element of bf16 that trains on a master.

    Args:
        optimizers: The optimizers, which hold what bf16 weights are beyond their 16 bits.
        engine: What the model runs in, which knows what other ranks hold of a weight.
    """

    def __init__(self, optimizers: Optimizers, engine: Engine) -> None:
        engine.check_gradient_norms()  # a rank that can't tell its part of a gradient can't of a weight
        self._optimizers, self._engine = optimizers, engine
        self._before: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    @torch.no_grad()
    def begin(self, active: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Begin a period.

        Args:
            active: Parameters that train of each active layer, by its index.
        """
        self._before = {
            index: [(p, self._exact(p).to("cpu", copy=True)) for p in own] for index, own in active.items()
        }

    def forget(self) -> None:
        """Compare nothing in this period: its beginning isn't known."""
        self._before = {}

    @torch.no_grad()
    def end(self) -> dict[int, float]:
        """Frobenius norms of the changes so far, by layer."""
        if not self._before:
            return {}
        squares = torch.stack([self._square_of(own) for own in self._before.values()])
        norms = self._engine.sum_over_shards(squares).sqrt().tolist()
        return dict(zip(self._before, norms, strict=True))

    def _square_of(self, own: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """The square of the change of one layer: one parameter's difference is there at a time."""
        pairs = ((self._exact(parameter), before) for parameter, before in own)
        norms = [
            torch.linalg.vector_norm(now - before.to(now.device), dtype=torch.float64).cpu()
            for now, before in pairs
        ]
        return torch.stack(norms).square().sum()

    def _exact(self, parameter: nn.Parameter) -> Tensor:
        values = local_part(parameter.detach())
        if parameter.dtype == torch.bfloat16:
            return combine(values, self._optimizers.state_of(parameter))
        return values
