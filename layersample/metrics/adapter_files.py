"""Read LoRA updates from a PEFT adapter: its folder, without unpickling anything, or a live PeftModel."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layersample.errors import ConfigError

logger = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?")
# These start from a changed base weight, so the model's own W isn't the one that the update belongs to.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LowRankUpdate:
    """The update s·B·A of one module.

    Args:
        path: Path of the module, in the model that was wrapped or in the PeftModel.
        a: A, ``(r, in)``; of a convolution ``(r, in, ...)``.
        b: B, ``(out, r)``; of a convolution ``(out, r, ...)``.
        scale: s = α / r, or α / √r with rank-stabilised LoRA.
    """

    path: str
    a: Tensor
    b: Tensor
    scale: float


def read_adapter_folder(folder: str | Path) -> list[LowRankUpdate]:
    """Read the updates of an adapter that PEFT saved.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ConfigError: If a file is missing, truncated or not what it should be, the adapter isn't a plain
            LoRA, or its weights contradict its configuration.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_weights(folder / _WEIGHTS).items():
        if match := _KEY.fullmatch(name):
            parts.setdefault(match["path"], {})[match["part"]] = tensor
    if not parts:
        raise ConfigError(f"{folder / _WEIGHTS} must hold lora_A and lora_B weights, but has none.")
    return [_build_update(path, found, config, folder) for path, found in parts.items()]


def read_live_adapter(model: nn.Module, adapter_name: str | None = None) -> list[LowRankUpdate]:
    """Read the updates of a PeftModel, or of any model with PEFT's LoRA layers in it.

    Args:
        model: The model; its adapter must not be merged.
        adapter_name: Which adapter; by default the active one.

    Raises:
        ConfigError: If there is no such adapter, it is merged, or isn't a plain LoRA.
    """
    layers = {path: module for path, module in model.named_modules() if _is_lora(module)}
    known = sorted({name for module in layers.values() for name in module.scaling})
    if not known:
        raise ConfigError(f"The model must have LoRA layers of PEFT, but {type(model).__name__} has none.")
    name = _choose(model, known) if adapter_name is None else adapter_name
    if name not in known:
        raise ConfigError(f"adapter_name must be one of the model's {', '.join(known)}, but got {name!r}.")
    return [_read_module(path, module, name) for path, module in layers.items() if name in module.scaling]


def has_lora(model: nn.Module) -> bool:
    """Whether a model has LoRA layers of PEFT in it."""
    return any(_is_lora(module) for module in model.modules())


def _is_lora(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling"))


def _choose(model: nn.Module, known: list[str]) -> str:
    active = getattr(model, "active_adapters", None)
    try:
        active = active() if callable(active) else active
    except ValueError:  # transformers' own method, on a model that PEFT was put into from outside
        active = None
    names = [name for name in active or known if name in known]
    if len(names) != 1:
        raise ConfigError(f"adapter_name must say which adapter to measure: {', '.join(names or known)}.")
    return names[0]


def _read_module(path: str, module: Any, name: str) -> LowRankUpdate:
    if module.merged_adapters:
        raise ConfigError(
            f"The adapter must not be merged into the weights, but at {path} it is: "
            "call model.unmerge_adapter() first."
        )
    if name in getattr(module, "lora_magnitude_vector", ()):
        raise ConfigError(f"The adapter must be a plain LoRA, but {path} has DoRA's magnitudes.")
    if hasattr(module, "parameter_name"):
        raise ConfigError(
            f"The adapter must be on modules, but at {path} it is on a parameter (target_parameters)."
        )
    if name in module.lora_A:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
    else:
        a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
    return LowRankUpdate(path, a.detach(), b.detach(), float(module.scaling[name]))


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"An adapter folder must hold {_CONFIG}, but there is no file {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON file, but can't be read: {error}.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise ConfigError(f"{path} must be of a LoRA adapter (peft_type LORA), but is of {kind}.")
    if config.get("use_dora") or config.get("target_parameters"):
        what = "use_dora" if config.get("use_dora") else "target_parameters"
        raise ConfigError(f"{path} must be of a plain LoRA on modules, but it sets {what}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        logger.warning(
            "%s: init_lora_weights=%r changed the base weights, so ratio and merged are off unless the model "
            "is that changed base.", path, start,
        )  # fmt: skip
    return config  # type: ignore[no-any-return]


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        hint = (
            " adapter_model.bin is a pickle and is never opened: save the adapter as safetensors."
            if pickled
            else ""
        )
        raise ConfigError(f"An adapter folder must hold {_WEIGHTS}, but there is no file {path}.{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} must be a whole safetensors file, but it is truncated or corrupt: {error}."
        ) from error


def _build_update(
    path: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> LowRankUpdate:
    if set(parts) != {"A", "B"}:
        raise ConfigError(
            f"{folder / _WEIGHTS} must hold both A and B of {path}, but has only {''.join(parts)}."
        )
    a, b = parts["A"], parts["B"]
    rank = _look_up(config, "rank_pattern", path, config.get("r"))
    if a.dim() < 2 or b.dim() < 2 or not a.shape[0] == b.shape[1] == rank:
        raise ConfigError(
            f"A and B of {path} must have the rank r={rank} of {_CONFIG}, but have shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    alpha = _look_up(config, "alpha_pattern", path, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"lora_alpha of {path} must be a number, but {_CONFIG} has {alpha!r}.")
    return LowRankUpdate(path, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _look_up(config: Mapping[str, Any], pattern: str, path: str, default: Any) -> Any:
    """The first entry whose key, a regular expression, matches the end of a path at a dot: PEFT's rule."""
    for key, value in (config.get(pattern) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except re.error as error:
            raise ConfigError(
                f"{pattern} of {_CONFIG} must have regular expressions, but {key!r} is none."
            ) from error
    return default
