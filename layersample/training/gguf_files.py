"""Models in GGUF files: their weights in a fresh model that can be trained and saved."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layersample.errors import ConfigError, short, some

_TEXT = "There are 12 of them."  # any tokenizer of a language model gives it back


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant by a path; ``None`` where it is another kind of model.

    Args:
        path: A file, or a folder; one with ``config.json`` is no GGUF model.

    Raises:
        ConfigError: If a folder holds several.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise ConfigError(
            f"The folder {str(path)!r} must hold one GGUF file, but holds {some(p.name for p in files)}: give the "
            "file itself."
        )
    return files[0] if files else None


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a GGUF file, dequantized.

    Args:
        file: The file.
        dtype: Type of the weights.

    Raises:
        ConfigError: If the package that reads them isn't installed.
    """
    _need_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # A model that was loaded from GGUF counts as quantized: it can neither be saved nor trained.
    config = loaded.config
    del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, load_gguf_tokenizer(file)


def load_gguf_config(file: Path) -> PretrainedConfig:
    """The configuration that the header of a GGUF file holds.

    Raises:
        ConfigError: If the package that reads them isn't installed.
    """
    _need_gguf()
    config: PretrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return config


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the special tokens that its header names.

    Raises:
        ConfigError: If the package that reads them isn't installed, or transformers makes a tokenizer that loses text.
    """
    _need_gguf()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers 5.17 took the first token for the last one: a model then never learns to stop.
    for kind, number in _special_tokens(file).items():
        if 0 <= number < len(tokenizer) and getattr(tokenizer, f"{kind}_id") != number:
            setattr(tokenizer, kind, tokenizer.convert_ids_to_tokens(number))
    check_tokenizer(tokenizer, file.name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make sure that a text comes back from its tokens.

    transformers 5.0 and 5.1 save a tokenizer of a GGUF file as one of another kind, in which spaces are unknown.

    Args:
        tokenizer: What was made of the file, or read back from a folder.
        name: The file's, for the message.

    Raises:
        ConfigError: If it doesn't.
    """
    back = str(tokenizer.decode(tokenizer(_TEXT, add_special_tokens=False)["input_ids"]))
    if "".join(back.split()) != "".join(_TEXT.split()):
        raise ConfigError(
            f"transformers {transformers.__version__} can't read the tokenizer of {name}: {_TEXT!r} comes back as "
            f"{short(back)}. Install a later version, or give a folder with the model's own tokenizer."
        )


def _special_tokens(file: Path) -> dict[str, int]:
    """The special tokens that a file's header names: of each kind its number."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    known = {kind: fields.get(f"tokenizer.ggml.{its}_token_id") for kind, its in kinds.items()}
    # Not field.contents(): gguf 0.10 hasn't got it.
    return {kind: int(field.parts[field.data[0]][0]) for kind, field in known.items() if field is not None}


def _need_gguf() -> None:
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'GGUF files and built-in models need the demo extra: pip install "layersample[demo]".'
        ) from error
