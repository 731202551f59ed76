"""How the report writes numbers."""

from __future__ import annotations

from .comparison import Difference, Estimate

DASH = "–"
_MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def with_interval(
    value: Estimate | None, digits: int = 3, scale: float = 1, unit: str = "", sign: bool = False
) -> str:
    """A mean over seeds with half of its interval."""
    if value is None:
        return DASH
    mean = signed(value.mean * scale, digits) if sign else f"{value.mean * scale:.{digits}f}"
    return mean + ("" if value.half_width is None else f" ± {value.half_width * scale:.{digits}f}") + unit


def interval(difference: Difference | None) -> str:
    """The interval of a difference."""
    if difference is None or difference.low is None or difference.high is None:
        return DASH
    return f"{signed(difference.low)} to {signed(difference.high)}"


def part_of(share: float) -> str:
    """What stands in front of something that a share is of: nothing where that is all of it."""
    return "" if share == 1 else f"{share:g} of "


def p_value(value: float | None) -> str:
    """A p-value; one below a thousandth says no more than that."""
    return DASH if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def mib(count: float | None) -> str:
    """Bytes as MiB."""
    return number(None if count is None else count / 2**20, "{:,.0f}")


def exact_mib(count: int) -> str:
    """Bytes as MiB, for limits that are missed by little."""
    return f"{count / 2**20:,.1f} MiB"


def seconds(value: float | None) -> str:
    """Seconds."""
    return number(value, "{:.2f}")


def number(value: float | None, style: str) -> str:
    """A number as a format has it; a dash where there is none."""
    return DASH if value is None else style.format(value)
