"""Deltas: only what trained, and back to the whole model to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from layersample import ConfigError
from layersample.exporting.deltas import apply_delta, export_delta
from layersample.exporting.manifest import DELTA_FILE, KEY
from layersample.exporting.saved_tensors import SavedTensors, content_hash, digest
from tests.helpers import make_llama, write_tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    write_tiny_model(folder)
    return folder


@torch.no_grad()
def train(base: Path, to: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """A model whose layers 1 and 3 have trained."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    for index in (1, 3):
        for weight in model.model.layers[index].parameters():
            weight.add_(0.5)
    model.save_pretrained(to, **saving)
    for path in base.iterdir():
        if not (to / path.name).exists() and path.suffix != ".safetensors":
            shutil.copy(path, to)
    return to


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "10KB"}], ids=["one file", "several files"])
def test_holds_what_trained_and_gives_the_model_back_to_the_bit(
    base: Path, tmp_path: Path, saving: dict[str, Any]
) -> None:
    model = train(base, tmp_path / "model", **saving)
    size = export_delta(base, model, tmp_path / "delta", name="base")
    held = load_file(tmp_path / "delta" / DELTA_FILE)
    assert {name.split(".")[2] for name in held} == {"1", "3"} and size.changed == len(held) == 18
    assert size.changed_bytes == sum(t.nbytes for t in held.values()) < size.total_bytes / 2
    # The tokenizer is the base's, and isn't stored again.
    assert not list((tmp_path / "delta").rglob("tokenizer*"))
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert files(tmp_path / "again") == files(model)


@pytest.mark.parametrize(
    ("stored", "trained"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_a_base_in_another_type_is_cast(tmp_path: Path, stored: torch.dtype, trained: torch.dtype) -> None:
    make_llama(dtype=stored).save_pretrained(tmp_path / "base")
    model = train(tmp_path / "base", tmp_path / "model", trained)
    assert export_delta(tmp_path / "base", model, tmp_path / "delta", name="base").changed == 18
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    assert files(tmp_path / "again") == files(model)


def test_the_sign_of_a_zero_and_what_a_nan_carries_are_bits_too(tmp_path: Path) -> None:
    for name, sign in (("base", 1.0), ("model", -1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weights = {"a": torch.zeros(2) * sign, "b": torch.tensor(torch.nan), "c": torch.empty(0, 3)}
        save_file(weights, tmp_path / name / "model.safetensors")
    assert export_delta(tmp_path / "base", tmp_path / "model", tmp_path / "delta", name="base").changed == 1
    assert set(load_file(tmp_path / "delta" / DELTA_FILE)) == {"a"}


def test_weights_and_files_that_the_base_lacks_are_stored(base: Path, tmp_path: Path) -> None:
    model = train(base, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "new": torch.ones(2)}, model / "model.safetensors", metadata={"format": "pt"})
    (model / "templates").mkdir()
    (model / "templates" / "tool.jinja").write_text("{{ messages }}")
    export_delta(base, model, tmp_path / "delta", name="base")
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert files(tmp_path / "again") == files(model)


def test_the_hash_of_a_model_is_that_of_its_content(base: Path, tmp_path: Path) -> None:
    def hash_of(folder: Path) -> str:
        saved = SavedTensors(folder)
        return content_hash({name: digest(saved[name]) for name in saved})

    LlamaForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert hash_of(tmp_path / "sharded") == hash_of(base)
    weights = load_file(base / "model.safetensors")
    name, weight = next(iter(weights.items()))
    for other in (
        {**weights, name: weight.bfloat16()},
        {**weights, name: weight.reshape(-1)},
        {("x" if key == name else key): value for key, value in weights.items()},
    ):
        save_file(other, tmp_path / "sharded" / "model.safetensors")
        assert hash_of(tmp_path / "sharded") != hash_of(base)


def test_another_base_is_refused_by_its_hash(base: Path, tmp_path: Path) -> None:
    model = train(base, tmp_path / "model")
    export_delta(base, model, tmp_path / "delta", name="base")
    with pytest.raises(
        ConfigError, match=r"the base that it was made from, base with the hash \w{12}…, but .*model"
    ):
        apply_delta(model, tmp_path / "delta", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


def test_a_model_that_is_its_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must differ from its base"):
        export_delta(base, base, tmp_path / "delta", name="base")


def test_folders_that_hold_something_are_left_alone(base: Path, tmp_path: Path) -> None:
    model = train(base, tmp_path / "model")
    with pytest.raises(ConfigError, match="must be new or empty"):
        export_delta(base, model, base, name="base")
    export_delta(base, model, tmp_path / "delta", name="base")
    with pytest.raises(ConfigError, match="must be new or empty"):
        apply_delta(base, tmp_path / "delta", model)


def rewrite(delta: Path, change: Any) -> None:
    """Change what a delta holds or says of itself."""
    path = delta / DELTA_FILE
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()[KEY])
    weights = load_file(path)
    change(manifest, weights)
    save_file(weights, path, metadata={"format": "pt", KEY: json.dumps(manifest)})


def lose(manifest: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights.pop("model.layers.1.mlp.up_proj.weight")


def flip(manifest: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1


def escape(manifest: dict[str, Any], weights: dict[str, Tensor]) -> None:
    manifest["files"]["../outside"] = {"source": "delta", "sha256": ""}


def age(manifest: dict[str, Any], weights: dict[str, Tensor]) -> None:
    manifest["version"] = 2


def mistype(manifest: dict[str, Any], weights: dict[str, Tensor]) -> None:
    file = manifest["weights"]["model.safetensors"]
    file["dtypes"]["lm_head.weight"] = "nn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "another hash"),
        (flip, "another hash"),
        (escape, "must stay within the folder"),
        (age, "because of version.* newer layersample"),
        (mistype, "must have a type of torch's"),
    ],
)
def test_a_damaged_delta_is_refused(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    export_delta(base, train(base, tmp_path / "model"), tmp_path / "delta", name="base")
    rewrite(tmp_path / "delta", change)
    with pytest.raises(ConfigError, match=message):
        apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


def test_what_is_no_delta_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    with pytest.raises(ConfigError, match="must be a whole file of safetensors"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again")
    shutil.copy(base / "model.safetensors", tmp_path / "delta" / DELTA_FILE)
    with pytest.raises(ConfigError, match="must be a delta of layersample export --delta"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again")
    (tmp_path / "delta" / DELTA_FILE).write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="must be a whole file of safetensors"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again")


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": "../outside.safetensors"}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="must be an index of weights|must stay within"):
        SavedTensors(tmp_path)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="must be saved as safetensors"):
        SavedTensors(tmp_path)
