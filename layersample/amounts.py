"""Amounts as a user gives them: bytes, or a part of a whole."""

from __future__ import annotations

import re
from fractions import Fraction

from pydantic import ByteSize, TypeAdapter, ValidationError

from layersample.errors import ConfigError

_SIZE = re.compile(r"\d*\.?\d+\s*[a-z]+", re.IGNORECASE)
_BYTES = TypeAdapter(ByteSize)


def read_amount(value: str | float, name: str) -> int | Fraction:
    """Bytes as an integer, or a part of the parameters as an exact fraction.

    Args:
        value: A size such as ``"2GiB"`` or ``"500MB"``, or a part, ``"5%"`` or ``0.05``.
        name: Name of the option, for the error.

    Raises:
        ConfigError: If it is neither, or a part that isn't above 0 and at most 1.
    """
    text = str(value).strip()
    found: int | Fraction | None = None
    try:
        # ByteSize reads what it can from the left, so it is asked only about what looks like a size as a whole.
        found = int(_BYTES.validate_python(text)) if _SIZE.fullmatch(text) else _part(text)
    except (ValidationError, ValueError):
        pass
    if found is None or not found > 0:
        raise ConfigError(
            f"{name} must be a size such as '2GiB' or '500MB', or a part of the parameters above 0 and at most 1, "
            f"such as 0.05 or '5%', but got {value!r}."
        )
    return found


def _part(text: str) -> Fraction | None:
    number = text.removesuffix("%")
    whole = 100 if text != number else 1
    if not 0 < float(number) <= whole:  # not by the fraction: that of 1e-999999999 has so many digits
        return None
    return Fraction(number.strip()) / whole
