from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "metrics"


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Build a random model of a family by the size of its configuration's fields."""

    def make(family: str = "llama", **fields: int | bool) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(_config(family, **fields)).eval()

    return make


def _config(family: str, **fields: int | bool) -> PretrainedConfig:
    from transformers import AutoConfig

    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", **{"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 60, "n_positions": 64} | fields
        )
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 60,
        "tie_word_embeddings": True,
    }
    if family in ("mixtral", "gpt_oss"):
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return AutoConfig.for_model(family, **sizes | fields)
