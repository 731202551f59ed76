"""The options of what a step holds between forward and backward; the command line and the Trainer share them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from layersample.option_files import Options
from layersample.options import Role, option

_AUTO_CHUNK = 128
"""Positions of a chunk where no number is given: smaller ones cost time, larger ones memory."""


def off(value: Any) -> Any:
    """Read 0 as ``None``, which is off: a flag of the command line can't say None."""
    return None if value == 0 and not isinstance(value, bool) else value


class ActivationOptions(Options):
    """What a step holds between forward and backward."""

    loss_chunk: Annotated[int | None | Literal["auto"], BeforeValidator(off)] = option(
        "auto",
        "Positions whose logits exist at a time, in the loss: a number; auto, 128 where that gives the model's own "
        "loss; or 0, which is off.",
        Role.IDENTITY,
        Role.MEMORY,
    )
    recompute: bool = option(
        True,
        "Compute cheap activations again in backward: the same to the bit, in less memory.",
        Role.IDENTITY,
        Role.MEMORY,
    )

    @property
    def chunk_positions(self) -> int | None:
        """Positions of a chunk, or ``None`` where the loss isn't to be chunked."""
        return _AUTO_CHUNK if self.loss_chunk == "auto" else self.loss_chunk
