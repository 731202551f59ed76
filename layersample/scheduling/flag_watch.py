"""Says which parameters somebody else froze or unfroze while layers were sampled, once and by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from layersample.errors import some

logger = logging.getLogger(__name__)


class FlagWatch:
    """Looks after each optimizer step whether ``requires_grad`` is still what the last switch left it at."""

    def __init__(self) -> None:
        self._set: list[tuple[str, nn.Parameter, bool]] = []
        self._told = False

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A period begins: note what trains. What is about to be set anew was looked at by :meth:`look`."""
        self._set = [(name, parameter, parameter.requires_grad) for name, parameter in parameters.items()]

    def look(self) -> None:
        """Warn of the parameters that were changed since."""
        if self._told:
            return
        changed = [(name, flag) for name, parameter, flag in self._set if parameter.requires_grad != flag]
        for trained, what in (
            (False, "trains until then, though its layer is frozen"),
            (True, "doesn't train until then"),
        ):
            names = [name for name, flag in changed if flag == trained]
            if names:
                self._told = True
                logger.warning(
                    "requires_grad of %s was changed from outside while layers are sampled; each switch sets it "
                    "again, and it %s. To freeze something for good, do so before the scheduler is made; to train "
                    "something always, name its group's rule (embeddings, head, norm, other), or leave its layer out "
                    "with layers=.",
                    some(names),
                    what,
                )
