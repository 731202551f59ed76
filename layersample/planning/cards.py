"""Common graphics cards, and which of them a peak fits."""

from __future__ import annotations

from collections.abc import Mapping

# Memory of a card by what it is sold as, in GiB; torch sees about 139 GiB of an H200.
CARDS: Mapping[str, float] = {
    **{f"{size} GB": size for size in (8, 10, 12, 16, 24, 32, 40, 48, 80, 96)},
    "141 GB": 139,
}
HEADROOM = 2**30
"""Bytes that are left for the driver and fragmentation."""


def cards_that_fit(peak_bytes: int) -> dict[str, bool]:
    """Whether a peak fits each common card, with :data:`HEADROOM` left."""
    return {name: peak_bytes + HEADROOM <= size * 2**30 for name, size in CARDS.items()}


def smallest_card(peak_bytes: int) -> str | None:
    """The smallest common card that a peak fits, if any."""
    return next((name for name, fits in cards_that_fit(peak_bytes).items() if fits), None)
