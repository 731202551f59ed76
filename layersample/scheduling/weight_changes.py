"""How far the weights of active layers move in a period, for samplers that ask for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.optim.masters import combine
from layersample.optim.optimizers import Optimizers
from layersample.optim.packing import add_begun, parameters_of, take_begun
from layersample.parallel.base import Engine
from layersample.unwrapping import is_dtensor, local_part

logger = logging.getLogger(__name__)


class WeightChanges:
    """Compares the weights of active layers at the end of a period with copies from its beginning.

    The copies are in the host's memory: exact values, 4 bytes for an element of bf16 that trains on a master. The
    optimizer's checkpoints hold them, so that a run that is resumed in the middle of a period knows how it began; but
    not those of shards, which may be others by then.

    Args:
        optimizers: The optimizers, which hold what bf16 weights are beyond their 16 bits.
        engine: What the model runs in, which knows what other ranks hold of a weight.
    """

    def __init__(self, optimizers: Optimizers, engine: Engine) -> None:
        engine.check_gradient_norms()  # a rank that can't tell its part of a gradient can't of a weight
        self._optimizers, self._engine = optimizers, engine
        self._before: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._unknown: tuple[int, ...] = ()
        self._hooks = [each.register_state_dict_post_hook(self._save) for each in optimizers.each]

    @torch.no_grad()
    def begin(self, active: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Begin a period.

        Args:
            active: Parameters that train of each active layer, by its index.
        """
        self._unknown = ()
        self._before = {
            index: [(p, self._exact(p).to("cpu", copy=True)) for p in own] for index, own in active.items()
        }

    def resume(self, names: Sequence[str]) -> None:
        """Go on in the middle of a period: what it began with is what the optimizers' checkpoints hold.

        A layer of which they don't hold all is named, and its change in this period is ``None``.

        Args:
            names: Names of all sampled layers.
        """
        found: dict[Tensor, Tensor] = {}
        for each in self._optimizers.each:
            parameters = parameters_of(each)
            found |= {parameters[n]: values for n, values in take_begun(each).items() if n < len(parameters)}
        for index, own in list(self._before.items()):
            if all(p in found and found[p].shape == before.shape for p, before in own):
                self._before[index] = [(p, found[p].to("cpu", before.dtype)) for p, before in own]
                continue
            del self._before[index]
            self._unknown = (*self._unknown, index)
            logger.warning(
                "weight_change of %s is None for the period in which the run is resumed: the optimizer's checkpoint "
                "doesn't hold the weights that the period began with, because it is of shards, or of before a "
                "sampler asked for them.",
                names[index],
            )

    def close(self) -> None:
        """Put nothing into checkpoints any more. Safe to call twice."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def end(self) -> dict[int, float | None]:
        """Frobenius norms of the changes so far, by layer; ``None`` where the period's beginning isn't known."""
        unknown: dict[int, float | None] = dict.fromkeys(self._unknown)
        if not self._before:
            return unknown
        squares = torch.stack([self._square_of(own) for own in self._before.values()])
        norms = self._engine.sum_over_shards(squares).sqrt().tolist()
        return unknown | dict(zip(self._before, norms, strict=True))

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put the weights that the period began with into an optimizer's checkpoint."""
        before = {p: values for own in self._before.values() for p, values in own if not is_dtensor(p)}
        numbers = enumerate(parameters_of(optimizer))
        add_begun(state_dict, {number: before[p] for number, p in numbers if p in before})

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
