"""Models and data that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from layersample import registry
from tests.helpers import write_sums, write_tiny_model

# rich takes the width of a console once, and pytest-xdist sets one for its processes; tests set their own.
os.environ.pop("COLUMNS", None)

# Tiny models gain nothing from more threads, and threads that spin slow everyone on a shared machine; so do those of
# processes that a test starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_new_names() -> Iterator[None]:
    """What a test registers is gone after it."""
    known: tuple[registry.Registry[Any], ...] = (registry.SAMPLERS, registry.PROJECTIONS)
    before = [(names, names.list()) for names in known]
    yield
    for names, classes in before:
        names.classes.clear()
        names.classes.update(classes)


@pytest.fixture(autouse=True)
def _libraries_speak_again() -> Iterator[None]:
    """A command that a test ran in this process has quietened them."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's cache, but for the real model, which is kept there."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 40 sums."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    write_sums(path)
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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(family, **fields)).eval()
        return model

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
