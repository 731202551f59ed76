from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PretrainedConfig,
)

from layersample import ConfigError
from layersample.config import TrainConfig
from layersample.planning.fake_models import fake_model
from layersample.planning.planner import plan
from tests.helpers import make_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXT: dict[str, Any] = {
    **{"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 28, "patch_size": 14},
}
SEQ2SEQ: dict[str, Any] = {
    **{
        "vocab_size": 260,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
    },
    **{
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
    },
}
T5 = {
    "vocab_size": 260,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,  # and no decoder_start_token_id
}
DEEPSEEK = {
    **{
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
}
JAMBA = {
    **{"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    **{"expert_layer_offset": 1, "mamba_dt_rank": 4},
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    **{
        kind: TEXT
        for kind in ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "cohere2", "gpt_neox", "bert")
    },
    "gpt2": {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mamba": {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mixtral": {**TEXT, "num_local_experts": 4},
    "qwen3_moe": {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {**TEXT, **DEEPSEEK},
    "gpt_oss": {**TEXT, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {**TEXT, **JAMBA},
    "t5": T5,
    "bart": SEQ2SEQ,
    "modernbert": {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "vit": VISION,
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
        "image_token_index": 5,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {
            **{"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32},
            "deepstack_visual_indexes": [0],
        },
    },
    "mllama": {"text_config": {**TEXT, "cross_attention_layers": [1]}, "vision_config": VISION},
}


def shape_of(kind: str) -> PretrainedConfig:
    shape: PretrainedConfig = AutoConfig.for_model(kind, **FAMILIES[kind])
    return shape


def options(**more: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 1, "max_length": 16, "num_active": 1, **more})


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_are_planned_in_fp32_as_in_bf16(kind: str) -> None:
    shape = shape_of(kind)
    planned = plan(shape, options(), baselines=False)
    half = plan(shape, options(precision="bf16"), baselines=False)
    weights = planned.worst.memory.moments["optimizer"]["weights"]
    assert weights >= 4 * planned.parameters
    halved = half.worst.memory.moments["optimizer"]["weights"]
    assert 2 * planned.parameters <= halved < weights
    assert planned.worst.memory.moments["optimizer"]["gradients"] > 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gemma3", "planned for text alone"),
        ("mllama", "the text model alone is planned"),
        ("t5", "Planned with the model's own loss"),
        ("llama", None),
    ],
)
def test_what_is_assumed_is_said_once(kind: str, words: str | None) -> None:
    notes = plan(shape_of(kind), options(), baselines=False).notes
    if words is None:
        assert notes == ()
    else:
        assert sum(words in note for note in notes) == 1


def test_a_chunked_loss_that_was_asked_for_is_not_left_out_in_silence() -> None:
    with pytest.raises(ConfigError, match="can't take the place of this model's own"):
        plan(shape_of("t5"), options(loss_chunk=64), baselines=False)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (
            "whisper",
            {},
            "must be one of causal, masked and encoder-decoder .* but 'whisper' is of another kind",
        ),
        ("wav2vec2", {}, "but 'wav2vec2' is of another kind"),
        ("time_series_transformer", {"prediction_length": 4}, "is of another kind"),
        (
            "blip-2",
            {"text_config": {**TEXT, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}},
            "A step of Blip2ForConditionalGeneration can't be planned: .* ends with TypeError: .*pixel_values",
        ),
    ],
)
def test_what_is_not_planned_is_said_in_one_sentence(kind: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(AutoConfig.for_model(kind, **given), options(), baselines=False)


def test_an_encoder_decoder_is_built_whole() -> None:
    with fake_model(shape_of("bart"), "fp32") as model:
        assert type(model).__name__ == "BartForConditionalGeneration"


def test_a_model_is_planned_as_its_own_class_and_left_alone() -> None:
    classifier = BertForSequenceClassification(BertConfig(**TEXT))
    before = classifier.config.to_dict()
    planned = plan(classifier, options(precision="bf16"), baselines=False)
    assert planned.parameters == sum(p.numel() for p in classifier.parameters())
    assert classifier.config.to_dict() == before

    class Mine(LlamaForCausalLM):
        pass

    with pytest.raises(ConfigError, match="but Mine is of another kind"):
        plan(Mine(make_llama(2).config), options(), baselines=False)


def test_a_warning_of_the_model_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    plan(shape_of("bert"), options(), baselines=False)
    assert sum("add `is_decoder=True.`" in record.message for record in caplog.records) == 1


def test_a_configuration_that_no_model_can_have_is_a_config_error() -> None:
    shape = shape_of("bert")
    shape.num_attention_heads = 5
    with pytest.raises(
        ConfigError, match=r"built of its configuration \(bert\), but that ends with ValueError: .*5"
    ):
        plan(shape, options(), baselines=False)
