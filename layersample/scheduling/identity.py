"""What a run is: the choices that a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersample.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSION = 1
_FIXED = ("version", "layers")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The scheduler's arguments on which every draw and update depends; they mean what they do there."""

    sampler: str
    sampler_options: Mapping[str, Any] | None
    projection: str | None
    projection_options: Mapping[str, Any] | None
    num_active: int
    period: int
    seed: int
    layers: Sequence[str]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as a checkpoint in JSON will give it back."""
        values = {**vars(self), "layers": list(self.layers), "version": _VERSION}
        for key in ("sampler_options", "projection_options"):
            values[key] = json.loads(json.dumps(dict(values[key] or {}), default=str))
        return values

    def changes(self, saved: Mapping[str, Any], *, allow: bool) -> set[str]:
        """What differs from a saved state.

        Args:
            saved: The state.
            allow: Whether anything may; version and layers never.

        Raises:
            ConfigError: If something differs that may not; it gives both values.
        """
        here = self.state_dict()
        changed = {key for key, value in here.items() if saved.get(key) != value}
        for key in sorted(changed):
            if key in _FIXED or not allow:
                raise ConfigError(
                    f"A run must be resumed with the {key} it was begun with: it was {saved.get(key)!r}, but is "
                    f"{here[key]!r} now."
                    + ("" if key in _FIXED else " Allow it with allow_changes=True (--allow-changes).")
                )
            logger.warning("%s was %r, and is %r from here on.", key, saved.get(key), here[key])
        return changed
