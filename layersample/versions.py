"""What differs between the versions of transformers that the library runs with, told by what is there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def installed(package: str) -> str:
    """What is installed of a package, in words."""
    return f"{package} {version(package)} is installed"


def checkpoint_activations(model: Any, options: Mapping[str, Any] | None = None) -> None:
    """Switch on a transformers model's gradient checkpointing, by the name that its version has for it.

    Args:
        model: The model, as it is or wrapped by PEFT.
        options: What ``torch.utils.checkpoint`` is given, as ``{"use_reentrant": False}``.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)  # 5.23
    (enable or model.gradient_checkpointing_enable)(None if options is None else dict(options))


def stop_checkpointing(model: Any) -> None:
    """Switch a transformers model's gradient checkpointing off."""
    disable = getattr(model, "activation_checkpointing_disable", None)  # 5.23
    (disable or model.gradient_checkpointing_disable)()
