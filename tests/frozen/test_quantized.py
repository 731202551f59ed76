"""Models that come quantized: refused by name, or dequantized by transformers, trained and saved as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps

from layersample import ConfigError, LayerScheduler, load_frozen
from tests.helpers import Given, causal_lm, make_batch, make_llama

Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama(3, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, config: dict[str, Any], change: Callable[[str, Tensor], Weights]) -> None:
    """Quantize what a folder holds, as others do it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    weights: Weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        weights |= change(name, value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight")


def to_fp8(name: str, value: Tensor) -> Weights:
    """One scale a block of 8 × 8."""
    if not is_matrix(name):
        return {name: value}
    rows, columns = value.shape
    blocks = value.float().view(rows // 8, 8, columns // 8, 8)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def to_mxfp4(name: str, value: Tensor) -> Weights:
    """Two codes a byte, and a power of two for each 32; any codes will do."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: value}
    experts, inputs, outputs = value.shape
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=drawn, dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": torch.full(codes.shape[:3], 120, dtype=torch.uint8)}


DEQUANTIZES = pytest.mark.skipif(
    torch.cuda.is_available() or Version(transformers.__version__) < Version("5.20"),
    reason="transformers keeps the codes where there is a GPU, and what it can't save before 5.20",
)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"],
}


@DEQUANTIZES
@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize(("config", "change"), [(FP8, to_fp8), (MXFP4, to_mxfp4)], ids=["fp8", "mxfp4"])
def test_what_transformers_dequantizes_trains_and_is_saved_as_it_is(
    config: dict[str, Any], change: Any, form: str | None, folder: Path, tmp_path: Path, caplog: Any
) -> None:
    if config is MXFP4:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "layer_types": ["full_attention"] * 2}
        experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
        causal_lm("gpt_oss", **sizes, **experts).to(torch.bfloat16).save_pretrained(folder)
    rewrite(folder, config, change)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(model, optimizer, Given((1,)), num_active=1, frozen_weights=form):
        model(**make_batch()).loss.backward()
        optimizer.step()
        model.save_pretrained(tmp_path / "saved")
    assert "turned into plain weights" in caplog.text
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value)
        if ".layers." in name and not name.endswith(("norm.weight", "sinks", "bias")):
            assert torch.equal(value, before[name]) == (".layers.1." not in name), name


@DEQUANTIZES
def test_a_model_that_is_loaded_rounded_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, FP8, to_fp8)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    model: Any = load_frozen(folder, frozen_weights="int8", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).state_dict()
    assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in plain)


class _OneWay(ConversionOps):
    """As transformers unpacks BitNet's: with no way back."""

    hf_quantizer = None

    def convert(self, *given: Any, **kwargs: Any) -> Any:
        raise AssertionError


def test_a_model_that_could_not_be_saved_is_refused() -> None:
    model: Any = make_llama(3)
    model._weight_conversions = [SimpleNamespace(operations=[_OneWay()])]
    model.hf_quantizer = Given()
    with pytest.raises(ConfigError, match=r"one that can be saved .* \(Given\).*: load the original model"):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), "lisa")


class _InBuffers(nn.Linear):
    """A Linear of somebody's own, whose matrix is codes and scales."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = None  # type: ignore[assignment]
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scales).round().to(dtype))
        self.register_buffer("scales", scales)


class _InAttributes(nn.Module):
    """The same, hidden from PyTorch."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.codes = (linear.weight.detach() / self.scales).round().to(dtype)


class _Whole(nn.Module):
    """A matrix of floats that is no parameter."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kept", linear.weight.detach().to(dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "said"),
    [
        (_InBuffers, torch.int8, r"came quantized \(_InBuffers, int8\)"),
        (_InBuffers, torch.int32, r"came quantized \(_InBuffers, int32\)"),
        (_InBuffers, torch.float8_e4m3fn, r"came quantized \(_InBuffers, float8_e4m3fn\)"),
        (_InAttributes, torch.uint8, r"came quantized \(_InAttributes, uint8\)"),
        (_Whole, torch.float32, "must have their matrices as parameters"),
    ],
)
@pytest.mark.parametrize("form", [None, "nf4"])
def test_matrices_that_are_no_parameters_are_refused(
    kind: Any, dtype: torch.dtype, said: str, form: str | None
) -> None:
    model: Any = make_llama(3)
    for layer in model.model.layers:
        for parent in (layer.mlp, layer.self_attn):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, kind(linear, dtype))
    with pytest.raises(ConfigError, match=rf"{said}.*Load the original model"):
        LayerScheduler(model, torch.optim.AdamW(model.parameters()), "lisa", frozen_weights=form)


def test_masks_and_positions_are_no_codes() -> None:
    model: Any = make_llama(3)
    for layer in model.model.layers:
        layer.mask = nn.Module()
        layer.mask.register_buffer("causal", torch.ones(32, 32, dtype=torch.bool))
        layer.mask.register_buffer("positions", torch.arange(256).view(1, -1))
        layer.mask.register_buffer("least", torch.tensor(-1e9))
        layer.register_buffer("table", torch.zeros(16, 16, dtype=torch.int32))  # beside matrices that train
    LayerScheduler(model, torch.optim.AdamW(model.parameters()), "lisa").close()


class _Packed(nn.Module):
    """As GPTQ and AWQ keep a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(16, 2, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(16))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: _Packed(), "_Packed"),
        (lambda: _linear(torch.zeros(16, 8, dtype=torch.uint8)), "Linear, uint8"),
        (lambda: _linear(torch.zeros(16, 8, dtype=torch.int8)), "Linear, int8"),
        (lambda: _linear(torch.zeros(16, 16).to(torch.float8_e4m3fn)), "Linear, float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("form", [None, "nf4"])
def test_a_model_that_comes_quantized_is_refused(module: Any, said: str, form: str | None) -> None:
    model: Any = make_llama(3)
    for layer in model.model.layers:
        layer.mlp.up_proj = module()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match=rf"came quantized \({said}\).*Load the original model"):
        LayerScheduler(model, optimizer, "lisa", frozen_weights=form)


def test_a_model_that_froze_all_of_itself_is_not_asked_to_unfreeze() -> None:
    model: Any = make_llama(3).requires_grad_(False)  # as HQQ leaves it
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Module()
        layer.mlp.up_proj.W_q = nn.Parameter(torch.zeros(16, 2, dtype=torch.uint8), requires_grad=False)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=r"came quantized \(Module, uint8\).*Load the original model"):
        LayerScheduler(model, optimizer, "lisa")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_a_quantized_folder_that_needs_a_package_is_refused_by_its_method(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    given = {"quant_method": method, "bits": 4, "group_size": 8, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
    with pytest.raises(ConfigError, match=rf"came quantized \({method}\), .*: load the original model"):
        load_frozen(folder, device="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bitsandbytes_own_layers_are_refused_but_for_adapters() -> None:
    from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
    from peft import LoraConfig, get_peft_model

    model: Any = make_llama(3)
    for layer in model.model.layers:
        quantized = Linear4bit(16, 32, bias=False, quant_type="nf4")  # type: ignore[no-untyped-call]
        quantized.load_state_dict(layer.mlp.up_proj.state_dict())
        layer.mlp.up_proj = quantized.to("cpu")
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="came quantized"):
        LayerScheduler(model, optimizer, "lisa")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    LayerScheduler(adapted, torch.optim.AdamW(trained), "lisa").close()
