"""Units smaller than a layer: what belongs together, in models that name their parts each in a way of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from layersample import ConfigError, find_layers
from layersample.choices import Granularity
from layersample.layers.rules import Units, arrange
from layersample.testing.models import Chain
from tests.helpers import causal_lm, make_llama

TRAIN: Any = {"embeddings": "train", "head": "train", "norm": "train", "other": "train"}


def units_of(model: nn.Module, granularity: Granularity, **rules: str) -> Units:
    chosen: Any = {**TRAIN, **rules}
    return arrange(model, find_layers(model), chosen, granularity=granularity)


def last_layer(model: nn.Module, granularity: Granularity) -> dict[str, list[str]]:
    """The units of the last layer, by their names within it."""
    layer = find_layers(model).layers[-1].name + "."
    return {
        unit.name.removeprefix(layer): [name.removeprefix(layer) for name in unit.parameters]
        for unit in units_of(model, granularity).sampled
        if unit.layer + "." == layer
    }


def on_meta(kind: str, *, lm: bool = True) -> Any:
    config = CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM if lm else AutoModel
        return model.from_config(config)


def test_the_units_of_a_llama_are_those_that_the_option_names() -> None:
    model = make_llama()
    assert last_layer(model, "block") == {
        "self_attn": ["input_layernorm.weight", *(f"self_attn.{m}_proj.weight" for m in "qkvo")],
        "mlp": [
            "post_attention_layernorm.weight",
            *(f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")),
        ],
    }
    modules = last_layer(model, "module")
    assert list(modules) == [
        *(f"self_attn.{m}_proj" for m in "qkvo"),
        *(f"mlp.{m}_proj" for m in ("gate", "up", "down")),
    ]
    assert modules["self_attn.q_proj"] == ["input_layernorm.weight", "self_attn.q_proj.weight"]
    assert modules["mlp.up_proj"] == ["mlp.up_proj.weight"]
    assert all(own == [name] for name, own in last_layer(model, "tensor").items())
    assert len(last_layer(model, "tensor")) == 9


@pytest.mark.parametrize(
    ("kind", "lm", "blocks"),
    [
        ("gpt2", True, ["attn", "mlp"]),
        ("opt", True, ["self_attn", "fc1+fc2"]),
        ("gemma2", True, ["self_attn", "mlp"]),
        ("mixtral", True, ["self_attn", "mlp"]),
        ("jamba", True, ["mamba", "feed_forward"]),
        ("granitemoehybrid", True, ["mamba", "block_sparse_moe+shared_mlp"]),
        ("recurrent_gemma", True, ["temporal_block", "mlp_block"]),
        ("bert", False, ["attention", "intermediate+output"]),
        ("t5", False, ["layer.0", "layer.1", "layer.2"]),
        ("bart", False, ["self_attn", "encoder_attn", "fc1+fc2"]),
    ],
)
def test_attention_and_mlp_are_told_apart_by_what_a_layer_is_made_of(
    kind: str, lm: bool, blocks: list[str]
) -> None:
    assert list(last_layer(on_meta(kind, lm=lm), "block")) == blocks


def test_norms_go_with_the_block_that_they_stand_before() -> None:
    opt = last_layer(on_meta("opt"), "block")
    assert {name.partition(".")[0] for name in opt["self_attn"]} == {"self_attn", "self_attn_layer_norm"}
    assert {name.partition(".")[0] for name in opt["fc1+fc2"]} == {"fc1", "fc2", "final_layer_norm"}
    gemma = last_layer(on_meta("gemma2"), "block")
    assert gemma["mlp"][:2] == ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]


@pytest.mark.parametrize("granularity", ["layer", "block", "module", "tensor"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_neox", "phi"])
def test_each_parameter_is_in_one_unit(kind: str, granularity: Granularity) -> None:
    model = causal_lm(kind)
    units = units_of(model, granularity, embeddings="sample", head="sample", norm="sample", other="sample")
    names = [name for unit in (*units.sampled, *units.always) for name in unit.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len({unit.name for unit in units.sampled}) == len(units.sampled)


def test_groups_that_are_sampled_are_split_where_they_hold_several() -> None:
    model = on_meta("gpt2")
    rules = {"embeddings": "sample", "head": "sample", "norm": "sample"}
    assert units_of(model, "block", **rules).sampled[0].name == "embeddings"
    names = [unit.name for unit in units_of(model, "module", **rules).sampled]
    assert names[:2] == ["transformer.wte", "transformer.wpe"] and names[-1] == "norm"
    assert units_of(make_llama(), "module", **rules).sampled[0].name == "embeddings"
    tensors = [unit.name for unit in units_of(model, "tensor", **rules).sampled]
    assert tensors[-2:] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_an_adapter_and_what_it_wraps_are_one_module() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    units = units_of(model, "module").sampled
    # What doesn't train isn't sampled: of each layer the two modules with an adapter.
    assert len(units) == 8
    assert [name.rpartition(".self_attn.")[2] for name in units[0].parameters] == [
        "base_model.model.model.layers.0.input_layernorm.weight",
        "q_proj.base_layer.weight",
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
    ]


def test_what_has_no_attention_says_so() -> None:
    with pytest.raises(ConfigError, match="needs layers with attention .* Chain has none .*'module'"):
        units_of(Chain(3), "block")
    assert len(units_of(Chain(3), "module").sampled) >= 3


def test_a_part_that_may_not_train_is_left_out() -> None:
    model = make_llama()
    for layer in model.model.layers:
        layer.input_layernorm.weight.requires_grad_(False)
    assert len(units_of(model, "tensor").sampled) == 4 * 8
    model.model.layers[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"but model\.layers\.1 has none"):
        units_of(model, "tensor")
