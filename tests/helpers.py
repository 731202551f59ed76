"""Models and batches small enough for unit tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from layersample import LayerSampler, SamplingContext


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
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    return model


def make_batch(seed: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens with labels."""
    tokens = torch.randint(0, 256, (size, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


# Before transformers 5.3 the Trainer loads the best weights, and ends a run, where nothing can be put around it.
OLD_TRAINER = pytest.mark.skipif(
    not hasattr(transformers.Trainer, "_run_epoch"), reason="refused before transformers 5.3"
)

SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def causal_lm(kind: str, **options: Any) -> Any:
    """A tiny model of a kind; its parts have other names in each, so its type says nothing of them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config).double().train()
    with torch.no_grad():  # logits of random weights are too small for a softcap to show
        model.get_output_embeddings().weight.mul_(50)
    return model


def make_mixtral() -> Any:
    """A tiny mixture of experts."""
    torch.manual_seed(0)
    sizes = {**SMALL, "intermediate_size": 16, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def on_meta(model_type: str, name: str) -> Any:
    with torch.device("meta"):
        return getattr(transformers, name)(CONFIG_MAPPING[model_type]())


class Given(LayerSampler):
    """The sets that a test gives, one a period."""

    def __init__(self, *sets: tuple[int, ...]) -> None:
        self._sets = sets

    def sample(self, context: SamplingContext) -> tuple[int, ...]:
        return self._sets[context.round % len(self._sets)]


def weights_of(model: nn.Module | None) -> dict[str, torch.Tensor]:
    """Copies of all weights; a Trainer's model may be None, as its type says."""
    assert model is not None
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def write_tiny_model(folder: Path) -> None:
    """A tiny Llama with a tokenizer of bytes."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ("<unk>", "<s>", "</s>", "<pad>")
    vocabulary |= {token: 256 + i for i, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True)),
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    ).save_pretrained(folder)
    make_llama().save_pretrained(folder)


def write_sums(path: Path) -> None:
    """40 sums, a line of JSON each."""
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
