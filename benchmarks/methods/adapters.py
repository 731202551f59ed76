"""Adapters as the baselines have them: beside every linear layer, of one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn
from transformers import PreTrainedModel

from layersample.config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel

_RANK = 16  # unless the option rank says another; alpha is twice the rank, as in most published LoRA runs


def adapter_rank(config: TrainConfig) -> int:
    """Rank of adapters: the option ``rank`` where it is given, 16 by default."""
    return config.rank or _RANK


def with_adapters(model: nn.Module, config: TrainConfig) -> PeftModel:
    """The model with LoRA beside every linear layer but the head; only that trains."""
    from peft import LoraConfig, get_peft_model

    rank = adapter_rank(config)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(cast(PreTrainedModel, model), settings)
