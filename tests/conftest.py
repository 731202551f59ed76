"""Models and data that the tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from layersample import registry
from tests.helpers import make_llama

# rich takes the width of a console once, and pytest-xdist sets one for its processes; tests set their own.
os.environ.pop("COLUMNS", None)

# Tiny models gain nothing from more threads, and threads that spin slow everyone on a shared machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_new_names() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = [(names, names.list()) for names in (registry.SAMPLERS, registry.PROJECTIONS)]
    yield
    for names, classes in before:
        names.classes.clear()
        names.classes.update(classes)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache, but for the real model, which is kept there."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-model")
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
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 40 sums."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M, fetched once into the user's cache."""
    from layersample.training.models import fetch_builtin

    return fetch_builtin("smollm2-135m")


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
