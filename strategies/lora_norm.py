"""LISA's own importance: how much LoRA changes each layer."""

from __future__ import annotations

import logging
import math
from dataclasses import InitVar, dataclass
from typing import Literal, get_args

from layersample import ConfigError, MeasuredSampler, Measurement, register
from layersample.metrics import LoraNorms, has_lora, lora_norms, probe_lora

logger = logging.getLogger(__name__)

Measure = Literal["ratio", "delta", "merged"]


@dataclass(kw_only=True, eq=False)
class _MeasureOption:
    """The option that is called as the method is: in one class, dataclasses would take the method for its default."""

    measure: InitVar[Measure] = "ratio"


@register("lora_norm")
@dataclass(kw_only=True, eq=False)
class LoraNorm(_MeasureOption, MeasuredSampler):
    """Draw layers by how much LoRA changes them (LISA's importance).

    The norms come from an adapter folder; or, without one, from the LoRA layers of the model itself if it is a
    PeftModel; or else from a short LoRA run on the first training batches, which leaves no trace.

    LISA's importance is w̃ / w, the mean norm of a layer's weights under LoRA over that under full fine-tuning.
    ``"merged"`` is it at the end of the LoRA run, with the norm both start from for w. It hardly differs
    between layers, since weights move little; ``"ratio"`` is the part of it that does.

    Args:
        adapter: Folder that PEFT saved (``adapter_config.json``, ``adapter_model.safetensors``).
        measure: ``"ratio"`` is ‖s·BA‖_F / ‖W‖_F, ``"delta"`` is ‖s·BA‖_F, ``"merged"`` is
            ‖W + s·BA‖_F / ‖W‖_F; over all modules of the layer that the adapter changes.
        probe_steps: Optimizer steps of the LoRA run, at least 1.
        probe_rank: Its rank, at least 1.
        probe_learning_rate: Its learning rate (AdamW), above 0.

    References:
        LISA, arXiv 2403.17919; LoRA, arXiv 2106.09685. No public code of LISA ships this sampler.
    """

    source = "arXiv 2403.17919"

    adapter: str | None = None
    probe_steps: int = 20
    probe_rank: int = 8
    probe_learning_rate: float = 1e-3

    def __post_init__(self, measure: Measure) -> None:
        super().__post_init__()
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, but got {measure!r}.")
        for name, value in (("probe_steps", self.probe_steps), ("probe_rank", self.probe_rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}.")
        if not (math.isfinite(self.probe_learning_rate) and self.probe_learning_rate > 0):
            raise ValueError(
                f"probe_learning_rate must be finite and above 0, but got {self.probe_learning_rate}."
            )
        self._measure = measure

    @property
    def needs_batches(self) -> bool:  # type: ignore[override]
        """Whether a LoRA is trained, because no adapter was named; not on a model that has one."""
        return self.adapter is None

    def measure(self, measurement: Measurement) -> None:  # type: ignore[misc]  # the option is no attribute
        """Find the norms of all layers: an adapter changes them together."""
        norms = self._norms(measurement)
        # A part of a layer that no adapter changes, such as a norm, isn't known to need no training.
        parts = {layer.name for layer in measurement.model_layers.layers if layer.within is not None}
        known = {name: found for name, found in norms.items() if found.base or name not in parts}
        self.scores = {name: _value(found, self._measure) for name, found in known.items()}
        logger.info("%s of LoRA by layer: %s", self._measure, self.scores)

    def _norms(self, measurement: Measurement) -> dict[str, LoraNorms]:
        if self.adapter is not None:
            return lora_norms(self.adapter, measurement.model, measurement.model_layers)
        if has_lora(measurement.model):
            return lora_norms(measurement.model, layers=measurement.model_layers)
        if measurement.batches is None:
            raise ConfigError(
                "The sampler 'lora_norm' needs an adapter folder (adapter=), a PeftModel, or batches to train "
                "a LoRA on (batches= of the scheduler), but got none of them."
            )
        return probe_lora(
            measurement.model,
            measurement.batches(),
            measurement.model_layers,
            steps=self.probe_steps,
            rank=self.probe_rank,
            learning_rate=self.probe_learning_rate,
            report=measurement.report,
        )


def _value(norms: LoraNorms, measure: Measure) -> float:
    if measure == "merged":
        return norms.merged / norms.base if norms.base else 0.0
    return norms.ratio if measure == "ratio" else norms.delta
