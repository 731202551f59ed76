from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from layersample import ConfigError, find_layers
from layersample.metrics import LoraNorms, lora_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's

Make = Callable[..., PreTrainedModel]

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 5, "self_attn.q_proj": 100},
    },
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
}


def train(model: nn.Module, config: dict[str, Any]) -> PeftModel:
    """A PeftModel whose B isn't zero any more."""
    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return wrapped


def naive_norms(wrapped: PeftModel) -> dict[str, LoraNorms]:
    """By PEFT's own get_delta_weight, as whole matrices."""
    squares: dict[str, list[float]] = {}
    for path, module in wrapped.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.scaling:
            layer = path[: path.index(".", path.index("layers.") + 7)] if "layers." in path else "embeddings"
            delta = module.get_delta_weight("default").detach().double()
            base = module.base_layer.weight.detach().double()
            old = squares.setdefault(layer, [0.0, 0.0, 0.0])
            new = [float(x.norm()) ** 2 for x in (delta, base, base + delta)]
            squares[layer] = [a + b for a, b in zip(old, new, strict=True)]
    return {
        name: LoraNorms(math.sqrt(d), math.sqrt(b), math.sqrt(d / b), math.sqrt(m))
        for name, (d, b, m) in squares.items()
    }


def close(found: LoraNorms, expected: LoraNorms) -> bool:
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", CONFIGS)
def test_live_and_folder_equal_pefts_delta_weights(make_model: Make, name: str, tmp_path: Path) -> None:
    wrapped = train(make_model(tie_word_embeddings=False), CONFIGS[name])
    expected = naive_norms(wrapped)
    live = lora_norms(wrapped)
    assert all(close(live[layer], norms) for layer, norms in expected.items())
    assert all(norms == LoraNorms(0, 0, 0, 0) for layer, norms in live.items() if layer not in expected)
    wrapped.save_pretrained(str(tmp_path))
    model = make_model(tie_word_embeddings=False)
    folder = lora_norms(tmp_path, model)
    assert list(folder)[:2] == [layer.name for layer in find_layers(model).layers]
    assert ("embeddings" in folder) == (name == "embedding")
    assert [vars(norms) for norms in folder.values()] == [
        pytest.approx(vars(norms), rel=1e-9) for norms in live.values()
    ]
    again = lora_norms(str(tmp_path), wrapped)  # a folder measured against a wrapped model
    assert again.keys() == live.keys()
    assert all(vars(again[layer]) == pytest.approx(vars(live[layer]), rel=1e-9) for layer in live)


def test_conv1d_is_transposed(make_model: Make, tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    wrapped = train(make_model("gpt2"), config)
    expected = {
        name.replace(".layers.", ".h."): norms for name, norms in naive_norms_of_gpt2(wrapped).items()
    }
    live = lora_norms(wrapped)
    assert all(close(live[layer], norms) for layer, norms in expected.items()) and len(expected) == 2
    wrapped.save_pretrained(str(tmp_path))
    folder = lora_norms(tmp_path, make_model("gpt2"))
    for ours, theirs in zip(folder.values(), live.values(), strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), rel=1e-9)


def naive_norms_of_gpt2(wrapped: PeftModel) -> dict[str, LoraNorms]:
    found = {}
    base: Any = wrapped.get_base_model()
    for index, block in enumerate(base.transformer.h):
        pairs = [
            (m.get_delta_weight("default").detach().double(), m.base_layer.weight.detach().double())
            for m in block.modules()
            if hasattr(m, "get_delta_weight")
        ]
        d, b, m = (
            math.sqrt(sum(float(x.norm()) ** 2 for x in xs))
            for xs in ([d for d, _ in pairs], [w for _, w in pairs], [w + d for d, w in pairs])
        )
        found[f"base_model.model.transformer.h.{index}"] = LoraNorms(d, b, d / b, m)
    return found


def test_merged_over_base_lies_within_one_and_the_ratio(make_model: Make) -> None:
    for norms in lora_norms(train(make_model(), CONFIGS["plain"])).values():
        assert 1 - norms.ratio <= norms.merged / norms.base <= 1 + norms.ratio


def test_an_untrained_adapter_changes_nothing(make_model: Make) -> None:
    wrapped = get_peft_model(make_model(), LoraConfig(**CONFIGS["plain"]))
    for norms in lora_norms(wrapped).values():
        assert norms.delta == norms.ratio == 0.0 and norms.merged == pytest.approx(norms.base)


def test_a_second_adapter_by_name(make_model: Make) -> None:
    wrapped = train(make_model(), CONFIGS["plain"])
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(norms.delta == 0 for norms in lora_norms(wrapped, adapter_name="other").values())
    assert all(norms.delta > 0 for norms in lora_norms(wrapped).values())
    with pytest.raises(ConfigError, match="one of the model's default, other, but got 'third'"):
        lora_norms(wrapped, adapter_name="third")


def test_a_merged_adapter(make_model: Make) -> None:
    wrapped = train(make_model(), CONFIGS["plain"])
    wrapped.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        lora_norms(wrapped)
    wrapped.unmerge_adapter()
    lora_norms(wrapped)


def test_a_model_without_an_adapter(make_model: Make) -> None:
    with pytest.raises(ConfigError, match="LoRA layers of PEFT, but LlamaForCausalLM has none"):
        lora_norms(make_model())


def test_dora_is_refused(make_model: Make, tmp_path: Path) -> None:
    wrapped = train(make_model(), CONFIGS["plain"] | {"use_dora": True})
    with pytest.raises(ConfigError, match="DoRA"):
        lora_norms(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="sets use_dora"):
        lora_norms(tmp_path, make_model())


def test_an_adapter_on_a_parameter_is_refused(make_model: Make) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ConfigError, match="target_parameters"):
        lora_norms(get_peft_model(make_model("mixtral"), config))


@pytest.fixture
def folder(make_model: Make, tmp_path: Path) -> Path:
    train(make_model(), CONFIGS["plain"]).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_for_a_model_of_another_size(make_model: Make, folder: Path) -> None:
    message = (
        r"at model\.layers\.0\.mlp\.down_proj its B·A has shape \(32, 48\) and the model's weight \(32, 64\)"
    )
    with pytest.raises(ConfigError, match=message):
        lora_norms(folder, make_model(intermediate_size=64))


def test_an_adapter_for_another_family_or_depth(make_model: Make, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 of its 6 modules aren't in GPT2LMHeadModel: 'model\.layers\.0"):
        lora_norms(folder, make_model("gpt2"))
    deep = train(make_model(num_hidden_layers=3), CONFIGS["one layer"] | {"layers_to_transform": [2]})
    deep.save_pretrained(str(folder))
    with pytest.raises(
        ConfigError, match=r"1 of its 1 modules .*'model\.layers\.2\.self_attn\.q_proj' \(B \(32, 4\)"
    ):
        lora_norms(folder, make_model())


@pytest.mark.parametrize("keep", [0, 5, 300, -8])
def test_a_truncated_file(make_model: Make, folder: Path, keep: int) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="whole safetensors file, but it is truncated or corrupt"):
        lora_norms(folder, make_model())


def test_missing_files(make_model: Make, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match=r"there is no file .* is a pickle and is never opened"):
        lora_norms(folder, make_model())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"must hold adapter_config\.json"):
        lora_norms(folder, make_model())
    with pytest.raises(ConfigError, match="model=None"):
        lora_norms(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA.*but is of IA3"),
        ({"r": 8}, r"must have the rank r=8 of adapter_config\.json, but have shapes"),
        ({"lora_alpha": "much"}, "lora_alpha of .* must be a number, but .* has 'much'"),
        ({"alpha_pattern": {"(": 3}}, "must have regular expressions, but '\\(' is none"),
    ],
)
def test_a_bad_configuration(make_model: Make, folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        lora_norms(folder, make_model())


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_corrupt_configuration(make_model: Make, folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"adapter_config\.json must be"):
        lora_norms(folder, make_model())


def test_half_an_adapter_or_none(make_model: Make, folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, weights)
    with pytest.raises(ConfigError, match="both A and B of .*, but has only A"):
        lora_norms(folder, make_model())
    save_file({"other": torch.zeros(2)}, weights)
    with pytest.raises(ConfigError, match="lora_A and lora_B weights, but has none"):
        lora_norms(folder, make_model())


def test_weights_that_are_not_finite(make_model: Make) -> None:
    wrapped: Any = train(make_model(), CONFIGS["plain"])
    wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError, match="must be finite"):
        lora_norms(wrapped)


def test_an_initialisation_that_changes_the_base_warns(
    make_model: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = train(make_model(), CONFIGS["plain"] | {"init_lora_weights": "pissa"})
    wrapped.save_pretrained(str(tmp_path))
    lora_norms(tmp_path, make_model())
    assert "'pissa' changed the base weights" in caplog.text
