"""What somebody else changes about a model while its layers are sampled: said once and by name, or refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import nn

from layersample.errors import ConfigError, some
from layersample.optim.optimizers import Optimizers

logger = logging.getLogger(__name__)


class OutsideChanges:
    """Looks for parameters that come, go, or are changed between two switches.

    Args:
        optimizers: The optimizers, which must go on holding what trains.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._flags: list[tuple[str, nn.Parameter, bool]] = []
        self._types: list[tuple[str, nn.Parameter, torch.dtype]] = []
        self._named_flags = self._named_later = False

    def check_parameters(
        self, names: AbstractSet[str], training: Mapping[str, nn.Parameter], later: Sequence[str]
    ) -> None:
        """Make sure that what is to train is there and in an optimizer, and name what has come.

        Args:
            names: Parameters that should train.
            training: Those of them that are in the model.
            later: Those that came into the model after the scheduler was made.

        Raises:
            ConfigError: If any are gone, or have been replaced by others that no optimizer holds.
        """
        if gone := names - training.keys():
            raise ConfigError(
                f"The model must keep the parameters that are sampled, but {some(sorted(gone))} isn't there any more: "
                "close() the scheduler, and make a new one for what the model is now."
            )
        held = {parameter for group in self._optimizers.param_groups for parameter in group["params"]}
        if replaced := [name for name, parameter in training.items() if parameter not in held]:
            raise ConfigError(
                f"Parameters must stay the optimizer's while layers are sampled, but {some(replaced)} isn't the one "
                "that it holds any more, and would never train (after load_state_dict(assign=True), or where a module "
                "was replaced): close() the scheduler, and make a new optimizer and a new scheduler."
            )
        if later and not self._named_later:
            self._named_later = True
            logger.warning(
                "%s came into the model after the scheduler was made: it isn't sampled, and trains if it requires a "
                "gradient and the optimizer holds it.",
                some(later),
            )

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A period begins: note what requires a gradient in it, and the types of weights."""
        self._flags = [(name, parameter, parameter.requires_grad) for name, parameter in parameters.items()]
        if not self._types:
            self._types = [(name, parameter, parameter.dtype) for name, parameter in parameters.items()]

    def look(self) -> None:
        """Look, after an optimizer step, whether flags and types are still as the last switch left them.

        Raises:
            ConfigError: If weights have another type than when sampling began: masters and remainders of bf16 weights
                wouldn't fit them.
        """
        for name, parameter, dtype in self._types:
            if parameter.dtype != dtype:
                raise ConfigError(
                    f"Weights must keep their type while layers are sampled, but {name} was {dtype} and is "
                    f"{parameter.dtype} now: close() the scheduler before model.to(...), and make a new one with a "
                    "new optimizer."
                )
        if self._named_flags:
            return
        changed = [(name, flag) for name, parameter, flag in self._flags if parameter.requires_grad != flag]
        for required, what in (
            (False, "trains until then, though its layer is frozen"),
            (True, "doesn't train until then"),
        ):
            names = [name for name, flag in changed if flag == required]
            if names:
                self._named_flags = True
                logger.warning(
                    "requires_grad of %s was changed from outside while layers are sampled; each switch sets it "
                    "again, and it %s. To freeze something for good, do so before the scheduler is made; to train "
                    "something always, name its group's rule (embeddings, head, norm, other), or leave its layer out "
                    "with layers=.",
                    some(names),
                    what,
                )
