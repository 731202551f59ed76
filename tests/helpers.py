"""Models and batches small enough for unit tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_llama(
    num_layers: int = 4, *, tie: bool = False, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama small enough for a unit test."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=259,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_batch(seed: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens with labels."""
    tokens = torch.randint(0, 256, (size, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}
