"""Where a model's exact weights are: in the model, or beside it in the optimizers or in the host's memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from layersample.frozen.weights import FrozenWeights
from layersample.optim.masters import MASTER, combine, follow
from layersample.optim.optimizers import Optimizers
from layersample.unwrapping import exact_values


class ExactWeights:
    """The exact weights of a model, wherever they are.

    Args:
        model: The model.
        optimizers: Its optimizers, which hold what bf16 weights are beyond their 16 bits.
        frozen: What holds frozen weights rounded, if anything does.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, frozen: FrozenWeights | None) -> None:
        self._model, self._optimizers, self._frozen = model, optimizers, frozen
        self.at_rest: dict[Tensor, dict[str, Tensor]] = {}
        """What makes bf16 weights exact, once the optimizers don't hold it any more."""

    def fp32(self) -> dict[str, Tensor]:
        """The model's state in fp32: bf16 weights with what their masters hold beyond them.

        A weight that was changed behind its master, by whatever means, wins where the two disagree.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {
            name: self._exact(value, parameters.get(name))
            if value.dtype == torch.bfloat16
            else value.detach()
            for name, value in self._model.state_dict(keep_vars=True).items()
        }

    def trained(self) -> dict[str, Tensor]:
        """The model's state but for what is still as in the file that it is mapped from, which isn't read."""
        frozen = {} if self._frozen is None else self._frozen.mapped
        parameters = dict(self._model.named_parameters())
        found = {name: exact_values(p).detach() for name, p in parameters.items() if name not in frozen}
        return found | {name: buffer.detach() for name, buffer in self._model.named_buffers()}

    def shown(self) -> AbstractContextManager[None]:
        """Have the model show, and compute with, the exact values of frozen weights."""
        return nullcontext() if self._frozen is None else self._frozen.exact()

    def _exact(self, weight: Tensor, parameter: Tensor | None) -> Tensor:
        """A weight in fp32; the optimizer knows it by its parameter, which may be held rounded."""
        if parameter is None:
            return combine(weight, {})
        state = self.at_rest.get(parameter) or self._optimizers.state_of(parameter)
        exact = combine(weight, state)
        return follow(exact.clone(), weight) if MASTER in state else exact
