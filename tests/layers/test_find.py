from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from layersample import find_layers
from tests.helpers import make_llama, on_meta

# model type, class, path of the first and the last layer, and of what must be frozen
MODELS: list[tuple[str, str, str, str, str]] = [
    ("bart", "BartForConditionalGeneration", "model.encoder.layers.0", "model.decoder.layers.11", ""),
    ("bert", "BertForSequenceClassification", "bert.encoder.layer.0", "bert.encoder.layer.11", ""),
    ("bloom", "BloomForCausalLM", "transformer.h.0", "transformer.h.1", ""),
    ("clap", "ClapModel", "text_model.encoder.layer.0", "audio_model.audio_encoder.layers.3", ""),
    ("clip", "CLIPModel", "text_model.encoder.layers.0", "vision_model.encoder.layers.11", ""),
    ("cohere", "CohereForCausalLM", "model.layers.0", "model.layers.39", ""),
    (
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        "deberta.encoder.layer.0",
        "deberta.encoder.layer.23",
        "",
    ),
    ("deepseek_v3", "DeepseekV3ForCausalLM", "model.layers.0", "model.layers.60", ""),
    ("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer.0", "dinov2.encoder.layer.11", ""),
    (
        "distilbert",
        "DistilBertForSequenceClassification",
        "distilbert.transformer.layer.0",
        "distilbert.transformer.layer.5",
        "",
    ),
    ("electra", "ElectraForMaskedLM", "electra.encoder.layer.0", "electra.encoder.layer.11", ""),
    ("falcon", "FalconForCausalLM", "transformer.h.0", "transformer.h.31", ""),
    ("gemma", "GemmaForCausalLM", "model.layers.0", "model.layers.27", ""),
    ("gemma2", "Gemma2ForCausalLM", "model.layers.0", "model.layers.25", ""),
    (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "model.language_model.layers.0",
        "model.language_model.layers.25",
        "model.vision_tower",
    ),
    ("glm4", "Glm4ForCausalLM", "model.layers.0", "model.layers.39", ""),
    ("gpt2", "GPT2LMHeadModel", "transformer.h.0", "transformer.h.11", ""),
    ("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.0", "gpt_neox.layers.43", ""),
    ("gpt_oss", "GptOssForCausalLM", "model.layers.0", "model.layers.35", ""),
    ("gptj", "GPTJForCausalLM", "transformer.h.0", "transformer.h.27", ""),
    ("granite", "GraniteForCausalLM", "model.layers.0", "model.layers.31", ""),
    (
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "model.text_model.layers.0",
        "model.text_model.layers.31",
        "model.vision_model",
    ),
    ("jamba", "JambaForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("lfm2", "Lfm2ForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("llama", "LlamaForCausalLM", "model.layers.0", "model.layers.31", ""),
    (
        "llava",
        "LlavaForConditionalGeneration",
        "model.language_model.layers.0",
        "model.language_model.layers.31",
        "model.vision_tower",
    ),
    ("mamba", "MambaForCausalLM", "backbone.layers.0", "backbone.layers.31", ""),
    ("mistral", "MistralForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("mixtral", "MixtralForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("modernbert", "ModernBertForMaskedLM", "model.layers.0", "model.layers.21", ""),
    (
        "musicgen",
        "MusicgenForConditionalGeneration",
        "text_encoder.encoder.block.0",
        "decoder.model.decoder.layers.23",
        "",
    ),
    ("olmo2", "Olmo2ForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("olmoe", "OlmoeForCausalLM", "model.layers.0", "model.layers.15", ""),
    ("opt", "OPTForCausalLM", "model.decoder.layers.0", "model.decoder.layers.11", ""),
    (
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "model.language_model.layers.0",
        "model.language_model.layers.17",
        "model.vision_tower",
    ),
    ("pegasus", "PegasusForConditionalGeneration", "model.encoder.layers.0", "model.decoder.layers.11", ""),
    ("phi3", "Phi3ForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("qwen2", "Qwen2ForCausalLM", "model.layers.0", "model.layers.31", ""),
    (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "model.language_model.layers.0",
        "model.language_model.layers.79",
        "model.visual",
    ),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "model.layers.0", "model.layers.23", ""),
    ("qwen3", "Qwen3ForCausalLM", "model.layers.0", "model.layers.31", ""),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "model.layers.0", "model.layers.23", ""),
    ("roberta", "RobertaForMaskedLM", "roberta.encoder.layer.0", "roberta.encoder.layer.11", ""),
    ("rwkv", "RwkvForCausalLM", "rwkv.blocks.0", "rwkv.blocks.31", ""),
    ("smollm3", "SmolLM3ForCausalLM", "model.layers.0", "model.layers.35", ""),
    ("starcoder2", "Starcoder2ForCausalLM", "model.layers.0", "model.layers.29", ""),
    ("swin", "SwinForImageClassification", "swin.encoder.layers.0", "swin.encoder.layers.3", ""),
    ("t5", "T5ForConditionalGeneration", "encoder.block.0", "decoder.block.5", ""),
    ("vit", "ViTForImageClassification", "vit.layers.0", "vit.layers.11", ""),
    ("wav2vec2", "Wav2Vec2ForCTC", "wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.11", ""),
    ("whisper", "WhisperForConditionalGeneration", "model.encoder.layers.0", "model.decoder.layers.3", ""),
    ("xlnet", "XLNetLMHeadModel", "transformer.layer.0", "transformer.layer.23", ""),
    ("zamba2", "Zamba2ForCausalLM", "model.layers.0", "model.layers.53", ""),
]


# Older transformers can't build these from a configuration's defaults, or names their layers otherwise.
CHANGED = ("idefics3", "musicgen", "vit", "zamba2")
IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


@pytest.mark.filterwarnings("ignore")  # what transformers says of its own configurations
@pytest.mark.parametrize(("model_type", "name", "first", "last", "tower"), MODELS, ids=[m[0] for m in MODELS])
def test_finds_the_layers_of(model_type: str, name: str, first: str, last: str, tower: str) -> None:
    if IS_OLD and model_type in CHANGED:
        pytest.skip("transformers has changed it by 5.23")
    model = on_meta(model_type, name)
    found = find_layers(model)
    assert (found.layers[0].name, found.layers[-1].name) == (first, last)
    sorted_once = [n for layer in (*found.layers, *found.groups.values()) for n in layer.parameters]
    assert sorted(sorted_once + list(found.frozen)) == sorted(n for n, _ in model.named_parameters())
    assert all(n.startswith(tower + ".") for n in found.frozen) and bool(found.frozen) == bool(tower)
    if tower == "" and model_type not in ("wav2vec2", "clip", "clap"):  # whose get_input_embeddings raises
        embedding = model.get_input_embeddings()
        names = {n for n, p in model.named_parameters() if any(p is q for q in embedding.parameters())}
        assert names <= set(found.groups["embeddings"].parameters)


@pytest.mark.filterwarnings("ignore")
def test_refuses_a_model_that_runs_one_layer_many_times() -> None:
    with pytest.raises(ValueError, match="AlbertForMaskedLM runs one layer many times"):
        find_layers(on_meta("albert", "AlbertForMaskedLM"))


@pytest.mark.skipif(IS_OLD, reason="transformers 5.0 can't build a zamba2")
@pytest.mark.filterwarnings("ignore")
def test_parameters_that_layers_share_are_no_layer_s_own() -> None:
    found = find_layers(on_meta("zamba2", "Zamba2ForCausalLM"))
    assert any("shared_transformer" in name for name in found.groups["other"].parameters)
    assert not any("shared_transformer.self_attn" in n for layer in found.layers for n in layer.parameters)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_an_encoder_and_its_decoder_are_found_in_order() -> None:
    found = find_layers(on_meta("t5", "T5ForConditionalGeneration"))
    stacks = [layer.name.split(".")[0] for layer in found.layers]
    assert stacks == sorted(stacks, reverse=True) and set(stacks) == {"encoder", "decoder"}


def test_groups_of_a_llama() -> None:
    untied, tied = find_layers(make_llama()), find_layers(make_llama(tie=True))
    assert untied.groups["embeddings"].parameters == ("model.embed_tokens.weight",)
    assert untied.groups["head"].parameters == ("lm_head.weight",)
    assert untied.groups["norm"].parameters == ("model.norm.weight",)
    assert not untied.tied_head
    assert tied.tied_head and tied.groups["head"].parameters == ()
    assert tied.groups["embeddings"].parameters == ("model.embed_tokens.weight",)


class Plain(nn.Module):
    """As a reader of nanoGPT would write it."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.wpe = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.ln_f = nn.LayerNorm(4)
        self.out = nn.Linear(4, 8, bias=False)
        if tie:
            self.out.weight = self.wte.weight


@pytest.mark.parametrize("tie", [False, True])
def test_plain_module_with_a_path(tie: bool) -> None:
    found = find_layers(Plain(tie), "blocks")
    assert [layer.name for layer in found.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found.groups["embeddings"].parameters == ("wte.weight", "wpe.weight")
    assert found.groups["norm"].parameters == ("ln_f.weight", "ln_f.bias")
    assert found.groups["head"].parameters == (() if tie else ("out.weight",))


class Named(nn.Module):
    """A plain module whose parts are called as it is told, in that order."""

    def __init__(self, *parts: str, config: Any = None) -> None:
        super().__init__()
        for part in parts:
            self.add_module(part, self._part(part))
        if config is not None:
            self.config = config

    @staticmethod
    def _part(name: str) -> nn.Module:
        if name == "blocks":
            return nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        return nn.Embedding(8, 4) if name in ("emb", "wte") else nn.Linear(4, 8, bias=False)


@pytest.mark.parametrize("config", [None, {"n_layer": 3}], ids=["no config", "a dict"])
@pytest.mark.parametrize(
    ("parts", "embeddings", "head", "other"),
    [
        (("emb", "blocks", "lm_head"), ["emb"], ["lm_head"], []),
        (("emb", "blocks", "out"), ["emb"], ["out"], []),
        (("lm_head", "emb", "blocks"), ["emb"], ["lm_head"], []),
        (("emb", "blocks", "unembedding"), ["emb"], ["unembedding"], []),
        (("unembed", "wte", "blocks"), ["wte"], ["unembed"], []),
        (("patch_embed", "blocks", "head"), ["patch_embed"], ["head"], []),
        (("embedded_adapter", "blocks", "head"), [], ["head"], ["embedded_adapter"]),
        (("rembed", "blocks", "ahead"), [], ["ahead"], ["rembed"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_groups_of_a_plain_module_by_whole_words(
    parts: tuple[str, ...], embeddings: list[str], head: list[str], other: list[str], config: Any
) -> None:
    groups = find_layers(Named(*parts, config=config), "blocks").groups
    found = [
        [n.removesuffix(".weight") for n in groups[g].parameters] for g in ("embeddings", "head", "other")
    ]
    assert found == [embeddings, head, other]


@pytest.mark.parametrize("parts", [("emb", "blocks", "out"), ("lm_head", "blocks", "emb")])
def test_a_tie_is_found_by_identity(parts: tuple[str, ...]) -> None:
    model = Named(*parts)
    model.get_submodule(parts[2]).weight = model.get_submodule(parts[0]).weight
    found = find_layers(model, "blocks")
    assert found.tied_head
    assert found.groups["embeddings"].parameters == (f"{parts[0]}.weight",)
    assert found.groups["head"].parameters == ()


class Wrapped(nn.Module):
    """A transformers model inside of a module of one's own, with a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.value = nn.Linear(16, 1)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("layers", [None, "inner.model.model.layers"])
def test_groups_of_a_wrapped_model(tie: bool, layers: str | None) -> None:
    outer = nn.Module()
    outer.inner = Wrapped(make_llama(tie=tie))
    found = find_layers(outer, layers)
    prefix = "inner.model"
    assert [layer.name for layer in found.layers] == [f"{prefix}.model.layers.{i}" for i in range(4)]
    assert found.groups["embeddings"].parameters == (f"{prefix}.model.embed_tokens.weight",)
    assert found.groups["norm"].parameters == (f"{prefix}.model.norm.weight",)
    head = ("inner.value.weight", "inner.value.bias")
    assert found.groups["head"].parameters == (head if tie else (f"{prefix}.lm_head.weight", *head))
    assert found.tied_head is tie


def test_a_module_around_two_models_has_the_layers_of_both() -> None:
    model = nn.ModuleDict({"query": make_llama(2), "document": make_llama(3)})
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == [
        *(f"query.model.layers.{i}" for i in range(2)),
        *(f"document.model.layers.{i}" for i in range(3)),
    ]
    assert found.frozen == ()


def test_a_dictionary_of_layers() -> None:
    llama = make_llama()
    llama.model.layers = nn.ModuleDict({f"block{i}": layer for i, layer in enumerate(llama.model.layers)})
    for layers in (None, "model.layers"):
        found = find_layers(llama, layers)
        assert [layer.name for layer in found.layers] == [f"model.layers.block{i}" for i in range(4)]


def test_plain_module_with_a_list() -> None:
    model = Plain(False)
    found = find_layers(model, [model.blocks[2], "blocks.0.0"])
    assert [layer.name for layer in found.layers] == ["blocks.2", "blocks.0.0"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, "No layers found in Plain: .* It has: 'blocks'"),
        ("block", "layers='block' must be the path of a ModuleList or Sequential. The model has: 'blocks'"),
        (["blocks.7"], "must be a submodule of the model or its path, but got 'blocks.7'"),
        ([nn.Linear(2, 2)], "must be a submodule of the model or its path, but got Linear"),
        (["blocks.1", "blocks.1.0"], "must not repeat or contain one another, but 'blocks.1.0' does"),
        (["blocks.1", "blocks.1"], "must not repeat or contain one another"),
    ],
)
def test_says_what_is_wrong_with_layers(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layers(Plain(False), layers)
