"""What a run is: the choices that a checkpoint must share with the run that resumes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from layersample.errors import ConfigError
from layersample.options import Role, names_with
from layersample.scheduling.options import SchedulerOptions

logger = logging.getLogger(__name__)

_VERSION = 1
_FIXED = ("version", "layers")


class RunIdentity:
    """The options on which every draw and update depends, and the layers that they led to.

    Args:
        options: The scheduler's options; those with the role of an identity count.
        sampler: Name of the sampler.
        projection: Name of the projection, if any.
        frozen_weights: Name of the format of frozen weights, if any.
        period: Optimizer steps between draws.
        layers: Names of all that is sampled.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        *,
        sampler: str,
        projection: str | None,
        frozen_weights: str | None,
        period: int,
        layers: Sequence[str],
    ) -> None:
        names = names_with(SchedulerOptions, Role.IDENTITY)
        values = {name: getattr(options, name) for name in sorted(names)}
        values |= {"sampler": sampler, "projection": projection}
        values |= {"frozen_weights": frozen_weights, "period": period, "seed": options.seed or 0}
        self._values = {
            **{name: _to_json(value) for name, value in values.items()},
            "layers": list(layers),
            "version": _VERSION,
        }

    def with_period(self, period: int) -> RunIdentity:
        """The same with another period."""
        other = object.__new__(RunIdentity)
        other._values = {**self._values, "period": period}
        return other

    def state_dict(self) -> dict[str, Any]:
        """All of it, as a checkpoint in JSON will give it back."""
        return dict(self._values)

    def changes(self, saved: Mapping[str, Any], *, allow: bool) -> set[str]:
        """What differs from a saved state.

        Args:
            saved: The state. An option that it doesn't know was added to layersample later, and counts as the same.
            allow: Whether anything may; version and layers never.

        Raises:
            ConfigError: If something differs that may not; it gives both values.
        """
        changed = {
            key
            for key, value in self._values.items()
            if (key in saved or key in _FIXED) and saved.get(key) != value
        }
        for key in sorted(changed):
            if key in _FIXED or not allow:
                raise ConfigError(
                    f"A run must be resumed with the {key} it was begun with: it was {saved.get(key)!r}, but is "
                    f"{self._values[key]!r} now."
                    + ("" if key in _FIXED else " Allow it with allow_changes=True (--allow-changes).")
                )
            logger.warning("%s was %r, and is %r from here on.", key, saved.get(key), self._values[key])
        return changed


def _to_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.loads(json.dumps(value, default=str))
