"""Optimizers that know parameters by their identity or place: bitsandbytes keeps settings of single ones that way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLACEHOLDER = nn.Parameter(torch.empty(0), requires_grad=False)
"""Keeps the place of a parameter in its group that isn't stepped there; without a gradient, it is passed over."""


def settle_overrides(optimizer: Optimizer) -> None:
    """Have bitsandbytes look up now which parameters have settings of their own: at its first step it is too late.

    It compares what is in its groups by then with the weights of modules (``register_module_override``, with which the
    Trainer keeps the state of embeddings in 32 bits).
    """
    check = getattr(optimizer, "check_overrides", None)
    if callable(check):
        check()


class IdentityRecords:
    """What an optimizer keeps by ``id(parameter)``, given to what stands in for the parameter while it steps.

    Args:
        optimizer: The optimizer.
        parameters: Its parameters.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        ids = {id(parameter) for parameter in parameters}
        self._records = [record for record in _dictionaries(optimizer) if ids & record.keys()]

    def lend(self, parameter: Tensor, stand_in: Tensor) -> None:
        """Know a stand-in as its parameter is known."""
        for record in self._records:
            if id(parameter) in record:
                record[id(stand_in)] = record[id(parameter)]

    def take_back(self, stand_in: Tensor) -> None:
        """Forget a stand-in, whose id may be another's next."""
        for record in self._records:
            record.pop(id(stand_in), None)


def knows_places(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps something by a parameter's place: (number of the group, number in the group)."""
    return any(
        isinstance(key, tuple) and len(key) == 2 and all(isinstance(number, int) for number in key)
        for record in _dictionaries(optimizer)
        for key in record
    )


def _dictionaries(optimizer: Optimizer) -> Iterator[dict[Any, Any]]:
    """Dictionaries among an optimizer's attributes, and among theirs; not its state, which moves with stand-ins."""
    for name, value in vars(optimizer).items():
        if name in ("state", "defaults", "param_groups"):
            continue
        if isinstance(value, dict):
            yield value
        elif not isinstance(value, (Tensor, type)):
            with suppress(TypeError):  # it has no attributes
                yield from (item for item in vars(value).values() if isinstance(item, dict))
