"""A callback for ms-swift, registered by a file that ``swift sft --external_plugins`` imports."""

from __future__ import annotations

from typing import Any

from layersample.errors import ConfigError
from layersample.integrations.front_door import (
    cannot_import,
    make_callback,
    need,
    refuse_beside,
    refuse_projecting,
)

_MINIMUM = "4.0"
_THEIRS = ("use_galore",)
_SAMPLES_LAYERS = "LISACallback"  # the class of ms-swift's own


def register(name: str = "layersample", **options: Any) -> None:
    """Make layer sampling one of ms-swift's callbacks, which ``--callbacks NAME`` chooses.

    ms-swift makes a callback before it sets its trainer up; this one attaches to the trainer at the end of that.

    Args:
        name: What ``--callbacks`` calls it.
        options: Options of :class:`~layersample.LayerSamplingCallback`.

    Raises:
        ConfigError: If ms-swift isn't installed or too old, or an option can't be used.
    """
    need("swift", "ms-swift", _MINIMUM)
    make_callback(options, "register")
    try:
        from swift.callbacks import TrainerCallback, callbacks_map
    except ImportError as error:
        raise cannot_import(error, "ms-swift", _MINIMUM, "swift.callbacks.callbacks_map") from error

    class LayerSampling(TrainerCallback):  # type: ignore[misc]  # of no known type without ms-swift
        """Waits until its trainer is set up."""

        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            _check(args, name, callbacks_map)
            self._sampling = make_callback(options, "register")
            self._attached = False

        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Attach; being put in front of the others, the callback is asked a second time."""
            if not self._attached:
                self._attached = True
                self._sampling.attach(self.trainer)

    callbacks_map[name] = LayerSampling


def _check(args: Any, name: str, callbacks: dict[str, Any]) -> None:
    refuse_beside(vars(args), _THEIRS, "ms-swift")
    refuse_projecting(getattr(args, "optimizer", None), "ms-swift", "in the plug-in's register()")
    chosen = getattr(args, "callbacks", ())
    others = [other for other in chosen if getattr(callbacks.get(other), "__name__", "") == _SAMPLES_LAYERS]
    if others:
        raise ConfigError(
            f"What trains must be chosen by one of the two, but --callbacks has both {others[0]}, ms-swift's own, and "
            f"{name}: leave one out."
        )
