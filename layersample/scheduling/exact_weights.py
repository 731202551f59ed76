"""The exact weights behind those that a model shows: behind bf16 ones, and behind rounded ones of frozen layers."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from layersample.frozen.weights import FrozenWeights
from layersample.scheduling.switch import Switch


class SeesExactWeights:
    """The part of a scheduler that looks at weights."""

    _switch: Switch

    def fp32_state_dict(self) -> dict[str, Tensor]:
        """The model's weights as they are, in fp32: bf16 weights with what their masters hold beyond them.

        Rounded to bf16 they are the model's weights, also where those have been changed since the last step.
        """
        return self._switch.weights.fp32()

    @property
    def frozen(self) -> FrozenWeights | None:
        """What is held rounded, in which bytes, and what isn't and why; ``None`` without ``frozen_weights``."""
        return self._switch.frozen

    def exact_weights(self) -> AbstractContextManager[None]:
        """For a while, have the model show and compute with what will be saved, as in an evaluation.

        Without ``frozen_weights`` that is what it does anyway. Exact values stay in the host's memory: they are
        copied to the device one module at a time. Don't train meanwhile.
        """
        return self._switch.weights.shown()

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The model's exact weights but for those that haven't trained and are still in the file they came from.

        For a run whose file is lost: what has trained isn't.
        """
        return self._switch.weights.trained()
