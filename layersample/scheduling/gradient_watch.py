"""Says which active layers get no gradient, once and by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from layersample.errors import ConfigError
from layersample.optim.optimizers import Optimizers
from layersample.optim.whole_state import needs_closure
from layersample.unwrapping import is_dtensor, local_part

logger = logging.getLogger(__name__)

PATIENCE = 4  # steps in a row: LayerDrop leaves a layer out now and then


class GradientWatch:
    """Warns of a layer that is active and gets no gradient, while other parameters do.

    It is the net for whatever cuts a layer off without an error: a wrapper, a compiled graph from before the layer
    was active, a checkpoint whose input needs no gradient. A layer that is left out of single steps (LayerDrop) is
    no such layer, so only one counts that got no gradient in any step of a whole period, and in at least
    ``PATIENCE`` steps in a row. A gradient of zeros is a gradient.

    Once each active layer has had its first gradient in a period, nothing is looked at until the next.

    Args:
        optimizers: The optimizers, whose steps are where gradients are whole.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._waiting: dict[str, list[nn.Parameter]] = {}
        self._others: list[nn.Parameter] = []
        self._others_got = False
        self._steps = 0  # of this period
        self._lacked: dict[str, int] = {}  # steps in a row without a gradient, over all periods
        self._told: set[str] = set()
        self._trained: list[nn.Parameter] = []
        self._has_stepped = False  # since the scheduler did
        self._handles = [
            # An optimizer that runs its closure by itself has gradients only once it has.
            each.register_step_post_hook(self._look)
            if needs_closure(each)
            else each.register_step_pre_hook(self._look)
            for each in optimizers.each
        ]

    def begin(self, active: Mapping[str, Sequence[nn.Parameter]], others: Sequence[nn.Parameter]) -> None:
        """Begin a period; the one before ends.

        Args:
            active: Parameters that train of each sampled layer that is active, by its name.
            others: The other parameters that train.
        """
        self.end()
        for name, parameters in active.items():
            here = [p for p in parameters if local_part(p).numel()]  # a shard may be empty
            if here and name not in self._told:
                self._waiting[name] = here
        self._others = list(others)
        self._trained = [*others, *(p for parameters in active.values() for p in parameters)]

    def count_step(self) -> None:
        """One more optimizer step is done; a step in backward calls the optimizer's once a parameter."""
        self._steps += 1

    def end(self) -> None:
        """End a period: say which layers had no gradient in it. Nothing is said twice."""
        if self._others_got:
            for name in self._waiting:
                self._lacked[name] = self._lacked.get(name, 0) + self._steps
                if self._lacked[name] >= PATIENCE:
                    self._tell(name)
        self._waiting, self._others, self._others_got, self._steps = {}, [], False, 0

    def close(self) -> None:
        """Look at nothing any more. Safe to call twice."""
        self.end()
        for handle in self._handles:
            handle.remove()

    def _tell(self, name: str) -> None:
        self._told.add(name)
        logger.warning(
            "%s got no gradient in any of the %d steps in which it was active, though other parameters did: it "
            "doesn't train. Either the model doesn't use it, or something cuts its gradient off: reentrant "
            "checkpointing (use_reentrant=False in its place), torch.compile of a model whose layers were frozen "
            "then (compile each layer, or with a newer torch), a detach() or no_grad() in the model.",
            name,
            self._lacked[name],
        )

    def check_order(self) -> None:
        """Refuse a loop that steps the scheduler in front of the optimizer, where a switch drops gradients.

        Raises:
            ConfigError: If no optimizer has stepped since the scheduler did, though there are gradients, finite ones:
                those that a ``GradScaler`` leaves out are no sign of it.
        """
        stepped, self._has_stepped = self._has_stepped, False
        # Of shards each rank sees a part, and one alone must neither refuse nor wait for the others.
        if stepped or any(map(is_dtensor, self._trained)):
            return
        standing = [p.grad for p in self._trained if p.grad is not None]
        if standing and all(bool(gradient.isfinite().all()) for gradient in standing):
            raise ConfigError(
                "The scheduler must step once after each optimizer step, because it counts them, and a switch drops "
                "the gradients of what it freezes, but there are gradients and no optimizer has stepped since: call "
                "optimizer.step(), then scheduler.step(), then optimizer.zero_grad(); with gradient accumulation all "
                "three only where the optimizer steps."
            )

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._has_stepped = True
        if not self._waiting:
            return
        got = [name for name, own in self._waiting.items() if any(p.grad is not None for p in own)]
        for name in got:
            del self._waiting[name]
            self._lacked.pop(name, None)
        self._others_got |= bool(got) or any(p.grad is not None for p in self._others)
