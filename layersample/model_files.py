"""What can be wrong with the folder of a model, or with its name, in a sentence that says what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layersample.errors import ConfigError, some

_CONVERT = (
    'load it in a script of your own and save it by model.save_pretrained("folder"), which writes safetensors'
)


@contextmanager
def loading(name: str, instead: str = "Choose another folder or hub id.") -> Iterator[None]:
    """Turn whatever a library raises while it reads a model's files into one sentence.

    Nothing but reading those files belongs inside: each error is taken for one of the files.

    Args:
        name: The model, as the user gave it.
        instead: What the user can do.

    Raises:
        ConfigError: In place of any other error.
    """
    try:
        yield
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # OSError, KeyError, SafetensorError, ImportError, …: as the model's kind has it
        method = quantized_by(Path(name))
        if method is not None:
            instead = (
                f"It came quantized ({method}), so that its matrices can't train: load the original model."
            )
        raise ConfigError(f"The model {name!r} could not be loaded: {reason(error)} {instead}") from error


def quantized_by(folder: Path) -> str | None:
    """How a model in a folder was quantized, as its configuration says; None where it wasn't, or is no folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    given = config.get("quantization_config") if isinstance(config, dict) else None
    return str(given.get("quant_method")) if isinstance(given, dict) else None


def reason(error: Exception, limit: int = 300) -> str:
    """What an error of a library says, on one line that ends in a full stop."""
    if isinstance(error, pickle.UnpicklingError):
        return f"its weights are a pickle that isn't opened, because it holds more than tensors: {_CONVERT}."
    if isinstance(error, RecursionError):
        return "a file of it is nested too deeply."
    # An error that only points to a traceback above names itself behind its last colon.
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text if text.endswith((".", "…", "!")) else f"{text}."


def check_folder(folder: Path, name: str) -> None:
    """Make sure that a folder holds a model's configuration.

    Args:
        folder: The folder.
        name: The model, as the user gave it.

    Raises:
        ConfigError: If it doesn't; it says what the folder holds instead.
    """
    path = folder / "config.json"
    if not path.is_file():
        names = sorted(p.name for p in folder.iterdir())
        if "adapter_config.json" in names:
            raise ConfigError(
                f"The model {name!r} must be a whole model, but the folder holds an adapter. Merge it into its base "
                "first (peft's merge_and_unload), and save that."
            )
        raise ConfigError(
            f"The model {name!r} must be a folder with config.json or a .gguf file, but it holds {some(names)}."
        )
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: must be JSON, but: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping, but holds a {type(content).__name__}.")


def check_has_weights(folder: Path, name: str) -> None:
    """Make sure that a model's folder holds weights, whatever they are.

    Raises:
        ConfigError: If it holds none; it says what it holds instead.
    """
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        raise ConfigError(
            f"The model {name!r} must hold weights (model.safetensors), but its folder holds {some(names)}."
        )


def is_path(name: str) -> bool:
    """Whether a name that is no folder is still meant as one, and not as a hub id."""
    return name.count("/") != 1 or name.startswith((".", "~", "/")) or name.endswith("/")


def check_weights(loaded: dict[str, Any], name: str) -> list[str]:
    """Make sure that each weight of the files has its model's shape.

    Args:
        loaded: The loading information that ``from_pretrained`` gives.
        name: The model, as the user gave it.

    Returns:
        Names of the weights that the files lack.

    Raises:
        ConfigError: If a shape is another one.
    """
    wrong = [
        f"{key} is {list(there)} in the files and {list(wanted)} by config.json"
        for key, there, wanted in sorted(loaded["mismatched_keys"])
    ]
    if wrong:
        raise ConfigError(
            f"The model {name!r} must have the shapes that its config.json gives, but {some(wrong, 2)}."
        )
    return sorted(loaded["missing_keys"])
