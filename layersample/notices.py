"""Warnings that are said once about one object, and one of another library's that would mislead."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

# Where bitsandbytes warns that a faster product in 4 bits, of the package kernels, isn't there for this CPU.
_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"
_SAID: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(logger: logging.Logger, about: object, message: str, *args: object) -> None:
    """Log a warning, unless the same words have been said about the same object.

    Args:
        logger: Logger of the module that warns.
        about: What it is about, a model say; it isn't kept alive.
        message: The words, with ``%s`` where ``args`` go.
        args: What goes there.
    """
    said = _SAID.setdefault(about, set())
    text = message % args if args else message
    if text not in said:
        said.add(text)
        logger.warning(message, *args)


def hide_missing_kernel() -> None:
    """Don't let bitsandbytes warn of a CPU kernel that isn't installed, whenever it is imported after this.

    peft imports it wherever it is installed, and transformers imports peft for any training, so the warning would
    stand over every run. The kernel is one for inference in 4 bits; nothing of ours calls it.
    """
    logging.getLogger(_BITSANDBYTES).addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
