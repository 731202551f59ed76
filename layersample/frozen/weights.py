"""All frozen weights of a model: which are rounded now, and how one sees through to their exact values."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError, some
from layersample.frozen.exact import Mappings, check_host
from layersample.frozen.formats import FORMATS
from layersample.frozen.forward import FrozenModule
from layersample.frozen.holdable import find_holdable, is_conv1d
from layersample.frozen.matrix import FrozenMatrix, left_alone
from layersample.layers.find import ModelLayers
from layersample.optim.host_copies import wait_for_copies
from layersample.unwrapping import FROZEN_WEIGHTS, is_fake

logger = logging.getLogger(__name__)


class FrozenWeights:
    """Holds the weights of a model's frozen layers in 8 or 4 bits on its device, and their exact values elsewhere.

    Exact values wait in the host's memory, or in the safetensors file that the model was loaded from as long as a
    weight hasn't trained. ``state_dict()`` gives them, and ``load_state_dict()`` takes them. Only a module's forward
    and the backward through it use the rounded ones.

    Args:
        model: The model, without wrappers.
        layers: Its layers.
        form: The format, or its name.
        stays: Whether the model is left rounded by :meth:`close`: it was when it was loaded.
        masters: Whether bf16 weights train on fp32 masters, which leave remainders in the host's memory.

    Raises:
        ConfigError: If the format is unknown, or needs what isn't installed; if no weight can be held so, or the
            model has frozen weights already; if the host's memory is too small.
    """

    def __init__(
        self, model: nn.Module, layers: ModelLayers, form: Any, *, stays: bool = False, masters: bool = False
    ) -> None:
        if find_frozen_weights(model) is not None:
            raise ConfigError(
                "A model must have its frozen weights in one format, but it has them in one already."
            )
        chosen, self.format = FORMATS.resolve(form)
        if not any(is_fake(parameter) for parameter in model.parameters()):  # a plan needs no kernels
            chosen.check()
        holdable = find_holdable(model, layers)
        self.kept = holdable.kept
        """Matrices that stay exact, and why."""
        if not holdable.names:
            raise ConfigError(
                f"frozen_weights={self.format!r} needs layers with matrices that can be held so, but found none: "
                f"{some(f'{name}: {why}' for name, why in self.kept.items())}."
            )
        if self.kept:
            logger.warning(
                "%d matrices of the layers stay exact on the device: %s.",
                *(len(self.kept), some((f"{name}: {why}" for name, why in self.kept.items()), 3)),
            )
        self._model, self._stays = model, stays
        mappings, parameters = Mappings(), dict(model.named_parameters())
        self._matrices: dict[str, FrozenMatrix] = {}
        by_module: dict[str, list[FrozenMatrix]] = {}
        for name in holdable.names:
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            file = mappings.file_of(parameters[name].detach())
            matrix = FrozenMatrix(name, module, own, chosen, transposed=is_conv1d(module), file=file)
            self._matrices[name] = matrix
            by_module.setdefault(path, []).append(matrix)
        away = [m for m in self._matrices.values() if m.is_mapped or m.parameter.device.type != "cpu"]
        exact = sum(m.parameter.nbytes for m in away)
        check_host(exact + (self.remainder_bytes if masters else 0), self.format)
        self._modules = {
            path: FrozenModule(model.get_submodule(path), own) for path, own in by_module.items()
        }
        self._look = model.register_forward_hook(self._look_at_first_output)
        setattr(model, FROZEN_WEIGHTS, self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that are rounded while they are frozen."""
        return tuple(self._matrices)

    @property
    def tensors(self) -> list[Tensor]:
        """Codes and scales on the device now."""
        return [tensor for matrix in self._matrices.values() for tensor in matrix.tensors]

    @property
    def exact_tensors(self) -> list[Tensor]:
        """Exact values of what is rounded now, which aren't on the device.

        Raises:
            ConfigError: If they are in a file that has changed.
        """
        return [matrix.exact() for matrix in self._matrices.values() if matrix.rounded is not None]

    @property
    def device_bytes(self) -> int:
        """Bytes of codes and scales on the device now."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def host_bytes(self) -> int:
        """Bytes of exact values in the host's memory now; those in the model's own files count nothing."""
        return sum(matrix.host_bytes for matrix in self._matrices.values())

    @property
    def remainder_bytes(self) -> int:
        """Bytes in the host's memory by which masters make these weights exact, once all have trained."""
        parameters = [matrix.parameter for matrix in self._matrices.values()]
        return sum(2 * p.numel() for p in parameters if p.dtype == torch.bfloat16)

    def describe(self) -> dict[str, Any]:
        """What is held how, of JSON types."""
        return {
            "format": self.format,
            "matrices": len(self._matrices),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "exact_on_the_device": dict(self.kept),
        }

    def activate(self, training: Container[str]) -> None:
        """Make whole what trains from now on.

        Args:
            training: Names of the parameters that train.

        Raises:
            ConfigError: If exact values are in a file that has changed, or somebody has written to what is rounded.
        """
        self._show(False)
        if done := self._undo():
            raise ConfigError(left_alone(done))
        for name, matrix in self._matrices.items():
            if name in training:
                matrix.activate()
        self._update()

    def freeze(self, training: Container[str], device: torch.device | None = None) -> None:
        """Round all that doesn't train from now on.

        Args:
            training: Names of the parameters that train.
            device: Where the codes are; by default where each weight is.
        """
        for name, matrix in self._matrices.items():
            if name not in training:
                matrix.freeze(device)
        wait_for_copies()  # a checkpoint may read them next
        self._update()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Have every parameter show its exact values, and the model compute with them.

        On another device than the host's they stay in the host's memory, and are copied to the device one module
        at a time while it runs. Don't train meanwhile.
        """
        if any(module._shows_exact for module in self._modules.values()):
            yield  # within another one
            return
        try:
            self._show(True)
            yield
        finally:
            self._show(False)

    @property
    def mapped(self) -> frozenset[str]:
        """Names of the weights whose exact values are in a file alone: they haven't trained."""
        return frozenset(name for name, matrix in self._matrices.items() if matrix.is_mapped)

    def close(self) -> None:
        """Leave the model as it was found: whole, or rounded if it was loaded so. Safe to call twice."""
        self._show(False)
        if done := self._undo():
            logger.warning("%s", left_alone(done))  # a scheduler that nothing refers to any more can't raise
        if self._stays:
            self.freeze(())
            return
        for matrix in self._matrices.values():
            matrix.activate()
        for module in self._modules.values():
            module.close()
        self._modules.clear()
        self._look.remove()
        vars(self._model).pop(FROZEN_WEIGHTS, None)

    def _undo(self) -> dict[str, str]:
        undone = ((name, matrix.undo()) for name, matrix in self._matrices.items())
        return {name: done for name, done in undone if done is not None}

    def _show(self, exact: bool) -> None:
        for module in self._modules.values():
            module.show(exact)

    def _update(self) -> None:
        for module in self._modules.values():
            module.update()

    def _look_at_first_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Find weights that were read past their modules, which shows in the first output as NaN."""
        self._look.remove()
        value = getattr(output, "loss", None)
        value = getattr(output, "logits", output) if value is None else value
        if not isinstance(value, Tensor) or bool(value.isfinite().all()):
            return
        missed = [path for path, one in self._modules.items() if one._frozen and not one.was_called]
        if missed:
            raise ConfigError(
                f"frozen_weights needs every frozen weight to be read in the forward of its own module, but "
                f"{some(missed)} didn't run, and the model's output is no number: train it without."
            )


def hold_frozen(model: nn.Module, layers: ModelLayers, form: Any, *, masters: bool) -> FrozenWeights | None:
    """The frozen weights that a scheduler asks for: those that the model was loaded with, or new ones.

    Args:
        model: The model, without wrappers.
        layers: Its layers.
        form: The format, or its name; None for none.
        masters: Whether bf16 weights train on fp32 masters.

    Raises:
        ConfigError: If the model was loaded with another format; or as :class:`FrozenWeights`.
    """
    found = find_frozen_weights(model)
    if found is None:
        return None if form is None else FrozenWeights(model, layers, form, masters=masters)
    _, name = FORMATS.resolve_optional(form)
    if name != found.format:
        raise ConfigError(
            f"The model was loaded with frozen weights in {found.format}, so LayerScheduler must be made with "
            f"frozen_weights={found.format!r}, but got {name!r}."
        )
    if masters:
        check_host(found.remainder_bytes, found.format)
    return found


def find_frozen_weights(model: nn.Module) -> FrozenWeights | None:
    """The frozen weights of a model, if it has any."""
    found: FrozenWeights | None = getattr(model, FROZEN_WEIGHTS, None)
    return found
