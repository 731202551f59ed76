"""Models of several towers: two encoders that are compared, and a language model beside what it looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from layersample import ConfigError, LayerScheduler, find_layers
from tests.helpers import make_llama

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
INPUTS = {"input_ids": torch.arange(3, 11).reshape(2, 4), "pixel_values": torch.ones(2, 3, 16, 16)}


def make_dual(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "vision-text":
        configs = transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT)
        config: Any = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*configs)
        config.projection_dim = 8
        return transformers.VisionTextDualEncoderModel(config)
    name = {"clip": "CLIP", "siglip": "Siglip", "altclip": "AltCLIP", "chinese_clip": "ChineseCLIP"}[kind]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return getattr(transformers, f"{name}Model")(config)  # type: ignore[no-any-return]


def make_llava() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=1),
        image_token_index=63,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def step(model: nn.Module, sampler: str, **options: Any) -> set[str]:
    """Names of the parameters that could move in the first period."""
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(model, optimizer, sampler, **options):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "siglip", "altclip", "chinese_clip", "vision-text"])
def test_both_encoders_of_two_that_are_compared_are_layers(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_dual(kind)
    found = find_layers(model)
    assert len(found.layers) == 4 and not found.frozen
    assert {"text" in layer.name for layer in found.layers} == {True, False}
    assert step(model, "full") == {name for name, _ in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with LayerScheduler(model, optimizer, "cyclic", num_active=1, period=1, check=True) as scheduler:
        for _ in range(4):
            model(**INPUTS, return_loss=True).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert scheduler.coverage == 1
    assert "stays frozen" not in caplog.text


def test_full_trains_the_tower_of_a_language_model_and_others_say_that_they_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_llava()
    everything = {name for name, _ in model.named_parameters()}
    assert step(model, "full") == everything
    assert "stays frozen" not in caplog.text
    tower = {name for name in everything if name.startswith("model.vision_tower.")}
    size = sum(p.numel() for n, p in model.named_parameters() if n in tower)
    for _ in range(2):
        assert not step(model, "lisa") & tower
    said = [r.getMessage() for r in caplog.records if "stays frozen" in r.getMessage()]
    assert len(said) == 1 and f"model.vision_tower ({size:,} parameters)" in said[0]


def test_what_the_user_froze_stays_frozen_and_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llava()
    for parameter in model.get_submodule("model.vision_tower").parameters():
        parameter.requires_grad_(False)
    for sampler in ("full", "lisa"):
        assert not any(name.startswith("model.vision_tower.") for name in step(model, sampler))
    assert "stays frozen" not in caplog.text


def test_the_body_of_a_vision_language_model_is_told_by_its_attention() -> None:
    found = find_layers(make_llava().get_submodule("model"))
    assert [layer.name for layer in found.layers] == ["language_model.layers.0", "language_model.layers.1"]
    assert found.towers == ("vision_tower",)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("sampler", ["full", "cyclic"])
def test_a_tower_has_its_gradients_under_reentrant_checkpointing(sampler: str) -> None:
    tokens = torch.tensor([[5, 63, 63, 63, 63, 6], [7, 63, 63, 63, 63, 8]])
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for reentrant in (False, True):
        model: Any = make_llava().double().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        rules: dict[str, Any] = {} if sampler == "full" else {"num_active": 1, "embeddings": "freeze"}
        with LayerScheduler(model, torch.optim.SGD(model.parameters()), sampler, **rules):
            model(input_ids=tokens, pixel_values=images, labels=tokens, use_cache=False).loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("vision_tower" in name for name in found[0]) == (sampler == "full")
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("group", ["embeddings", "head"])
def test_a_rule_that_holds_for_nothing_is_refused(group: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    with pytest.raises(
        ConfigError, match=f"{group}='freeze' must hold for something.*first.weight, first.bias"
    ):
        step(Odd(), "lisa", layers="blocks", **{group: "freeze"})
    assert not {"first.weight"} & step(Odd(), "lisa", layers="blocks", other="freeze", **{group: "freeze"})


def test_the_rules_of_a_tied_plain_head_and_of_a_wrapped_one_hold() -> None:
    class Around(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.model = make_llama(tie=tie)

    for tie in (False, True):
        trained = step(Around(tie), "lisa", head="freeze")
        assert "model.lm_head.weight" not in trained
        assert ("model.model.embed_tokens.weight" in trained) is not tie
