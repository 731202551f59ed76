"""The methods that layer sampling is compared with, each by the package that its users use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.config import TrainConfig
from layersample.optim.memory_use import optimizer_tensors

from .adapters import adapter_rank, with_adapters
from .method import Prepared, register_baseline, sample_layers


@register_baseline("lora", rate_scale=5.0, extra=("peft", "train"), adapter_rank=adapter_rank)
def lora(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train rank-16 adapters beside every linear layer (LoRA, PEFT).

    References:
        arXiv 2106.09685.
    """
    return Prepared(with_adapters(model, config))


@register_baseline("lora-fa", rate_scale=5.0, extra=("peft", "train"))
def lora_fa(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train only the B of LoRA's A and B, with AdamW (LoRA-FA as its paper's text has it).

    References:
        arXiv 2308.03303.
    """
    adapted = with_adapters(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return Prepared(adapted)


@register_baseline("lora-fa-peft", rate_scale=5.0, extra=("peft", "train"))
def lora_fa_peft(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train only the B of LoRA, with its gradient corrected by A (PEFT's create_lorafa_optimizer).

    References:
        arXiv 2308.03303.
    """
    from peft.optimizers import create_lorafa_optimizer

    rank = adapter_rank(config)
    adapted = with_adapters(model, config)
    optimizer = create_lorafa_optimizer(
        adapted, r=rank, lora_alpha=2 * rank, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    return Prepared(adapted, optimizer)


@register_baseline("badam", extra=("badam", "baselines"))
def badam(model: nn.Module, config: TrainConfig) -> Prepared:
    """Train one layer at a time, from the output to the input, with fresh AdamW state (the badam package).

    References:
        arXiv 2404.02827.
    """
    return train_blocks(model, config)


def train_blocks(model: nn.Module, config: TrainConfig, *, first: int | None = None) -> Prepared:
    """A model as the badam package trains it.

    Args:
        model: The model.
        config: Its period, learning rate and weight decay count.
        first: The layer that it starts from; by default the last one.
    """
    from badam import BlockOptimizer

    inner = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    optimizer: Optimizer = BlockOptimizer(
        base_optimizer=inner,
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=config.run_period,
        start_block=first,
        switch_mode="descending",
        verbose=0,
    )

    def tensors() -> Iterator[Tensor]:
        # It trains fp32 copies of the active block, which only the inner optimizer knows.
        copies = (parameter for group in inner.param_groups for parameter in group["params"])
        return chain(copies, optimizer_tensors(inner))

    return Prepared(model, optimizer, optimizer_tensors=tensors)


@register_baseline("lisa-published", options={"sampler": "lisa", "state": "keep"}, samples=True)
def lisa_published(model: nn.Module, config: TrainConfig) -> Prepared:
    """LISA as its authors' code runs it: the optimizer state of frozen layers is kept."""
    return sample_layers(model, config)


@register_baseline(
    "galore-published",
    options={"sampler": "full", "projection": "galore", "projection_options": {"basis": "svd"}},
    samples=True,
)
def galore_published(model: nn.Module, config: TrainConfig) -> Prepared:
    """GaLore on the whole model, with a basis by SVD that is kept for 200 steps, as its authors' code has it.

    References:
        arXiv 2403.03507.
    """
    return sample_layers(model, config)
