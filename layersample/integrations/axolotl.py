"""A plug-in for axolotl: ``plugins: [layersample.integrations.axolotl.LayerSamplingPlugin]``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from layersample.errors import ConfigError
from layersample.integrations.front_door import make_callback, refuse_beside, refuse_projecting, too_old

try:
    from axolotl.integrations.base import BasePlugin
except ImportError as error:
    raise ConfigError("This plug-in is axolotl's, which isn't installed: pip install axolotl.") from error

_OPTIONS = "layer_sampling"
_MINIMUM = "0.10"
_THEIRS = ("lisa_n_layers", "lisa_step_interval", "lisa_layers_attribute", "unfrozen_parameters")


class LayerSamplingArgs(BaseModel):
    """The plug-in's key in axolotl's file.

    Args:
        layer_sampling: Options of :class:`~layersample.LayerSamplingCallback`; without it, its defaults.
    """

    layer_sampling: dict[str, Any] | None = Field(default=None)


class LayerSamplingPlugin(BasePlugin):  # type: ignore[misc]  # of no known type without axolotl
    """Layer sampling in axolotl's trainers, with the options of ``layer_sampling:`` in its file.

    It attaches to the trainer once that is made, so that DDP, FSDP2 and checkpoints are right. axolotl's own LISA
    (``lisa_*``) beside it is refused, and so are ``unfrozen_parameters`` and optimizers that project.

    Raises:
        ConfigError: If axolotl is too old, or its file has options that don't go with layer sampling.
    """

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(BasePlugin, "post_trainer_create"):
            raise too_old("axolotl", _MINIMUM, "BasePlugin.post_trainer_create")

    def register(self, cfg: Any) -> None:
        """Check the options before a model is loaded."""
        _check(cfg)

    def get_input_args(self) -> str:
        """Where the plug-in's key is described; axolotl imports it by name."""
        return f"{__name__}.{LayerSamplingArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach to the trainer."""
        _check(cfg)
        make_callback(cfg.get(_OPTIONS), _OPTIONS).attach(trainer)


def _check(cfg: Any) -> None:
    refuse_beside(cfg, _THEIRS, "axolotl")
    refuse_projecting(cfg.get("optimizer"), "axolotl", f"among the options of {_OPTIONS}")
    make_callback(cfg.get(_OPTIONS), _OPTIONS)
