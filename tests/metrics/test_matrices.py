from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from layersample import find_layers
from layersample.metrics import weight_matrices

Make = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(("family", "per_layer"), [("llama", 7), ("gpt2", 4)])
def test_the_linear_weights_of_each_layer(make_model: Make, family: str, per_layer: int) -> None:
    model = make_model(family)
    found = weight_matrices(model)
    assert [matrix.layer for matrix in found] == [
        layer.name for layer in find_layers(model).layers for _ in range(per_layer)
    ]
    for matrix in found:
        assert matrix.weight.data_ptr() == model.get_parameter(matrix.name).data_ptr()
        assert not matrix.weight.requires_grad


def test_a_tied_weight_comes_once(make_model: Make) -> None:
    tied = [matrix.name for matrix in weight_matrices(make_model(), embeddings=True)]
    assert tied.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in tied
    untied = [m.name for m in weight_matrices(make_model(tie_word_embeddings=False), embeddings=True)]
    assert untied[-2:] == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_of_a_fused_weight_and_no_bias(make_model: Make, family: str) -> None:
    model = make_model(family)
    found = [m for m in weight_matrices(model) if m.expert is not None]
    assert len(found) == 2 * 2 * 4  # layers, weights, experts
    last = found[-1]
    assert last.name == f"{last.parameter}[3]"
    torch.testing.assert_close(last.weight, model.get_parameter(last.parameter)[3])
    assert not [m.name for m in weight_matrices(model) if "bias" in m.name]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["embed_tokens", "v_proj"]])
def test_a_peft_model_counts_its_base_weights_once(make_model: Make, target: list[str]) -> None:
    plain = weight_matrices(make_model(tie_word_embeddings=False), embeddings=True)
    config = LoraConfig(r=4, target_modules=target, modules_to_save=["lm_head"])
    model = get_peft_model(make_model(tie_word_embeddings=False), config)
    found = weight_matrices(model, embeddings=True)
    assert not [m.name for m in found if "lora" in m.name or "modules_to_save" in m.name]
    assert [m.weight.shape for m in found] == [m.weight.shape for m in plain]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)


def test_convolutions_and_state_matrices_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 4)
            self.proj = nn.Linear(8, 16)
            self.norm = nn.LayerNorm(8)
            self.A_log = nn.Parameter(torch.zeros(8, 4))

    model = nn.Sequential(Block(), Block())
    found = weight_matrices(model, find_layers(model, layers=""))
    assert [matrix.name for matrix in found] == ["0.proj.weight", "1.proj.weight"]


def test_a_few_of_the_layers(make_model: Make) -> None:
    model = make_model()
    layers = find_layers(model)
    found = weight_matrices(model, replace(layers, layers=layers.layers[1:]))
    assert {matrix.layer for matrix in found} == {"model.layers.1"}
