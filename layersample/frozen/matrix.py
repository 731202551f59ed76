"""One frozen weight: its codes on the device, its exact values elsewhere, and a parameter that holds nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError, some
from layersample.frozen.exact import MappedFile
from layersample.frozen.formats import FrozenFormat
from layersample.optim.host_copies import to_host
from layersample.unwrapping import FROZEN

_INSTEAD = "do it within scheduler.exact_weights(), or close() the scheduler before."


class Rounded:
    """A weight as its codes: immutable, so that what backward has saved of it stays what it was.

    Args:
        form: The format.
        codes: Of each matrix, what the format made of it.
        shape: Of the weight: ``(rows, columns)``, or with the number of experts in front.
        dtype: Of the weight.
        transposed: Whether the format sees the matrix transposed: it is stored as (in, out).
    """

    def __init__(
        self,
        form: FrozenFormat,
        codes: tuple[tuple[Tensor, ...], ...],
        shape: torch.Size,
        dtype: torch.dtype,
        transposed: bool,
    ) -> None:
        self.form, self.codes, self.shape, self.dtype, self.transposed = form, codes, shape, dtype, transposed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are held."""
        return tuple(tensor for codes in self.codes for tensor in codes)

    def matrix(self, index: int, tensors: Iterable[Tensor] | None = None) -> Tensor:
        """One matrix, dequantized.

        Args:
            index: Which of several; 0 where there is one.
            tensors: Its codes, where they come from elsewhere.
        """
        codes = self.codes[index] if tensors is None else tuple(tensors)
        rows, columns = self.shape[-2:]
        if self.transposed:
            return self.form.dequantize(codes, (columns, rows), self.dtype).t()
        return self.form.dequantize(codes, (rows, columns), self.dtype)

    def whole(self) -> Tensor:
        """The weight, dequantized."""
        if len(self.shape) == 2:
            return self.matrix(0)
        return torch.stack([self.matrix(index) for index in range(len(self.codes))])

    def to(self, device: torch.device) -> Rounded:
        """The same on another device."""
        codes = tuple(tuple(tensor.to(device) for tensor in one) for one in self.codes)
        return Rounded(self.form, codes, self.shape, self.dtype, self.transposed)


class FrozenMatrix:
    """A weight that is rounded on the device while it is frozen.

    The user's parameter stays what it is, with its name, shape, type and place in the optimizer, but its storage is
    a single element: NaN, so that whatever reads it past the module that multiplies by it can't go unnoticed.

    Args:
        name: Of the parameter.
        module: The module that has it.
        own: Its name there.
        form: The format.
        transposed: Whether it is stored as (in, out).
        file: The file that its values are mapped from, if they are.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        own: str,
        form: FrozenFormat,
        *,
        transposed: bool,
        file: MappedFile | None,
    ) -> None:
        self.name, self.module, self.own = name, module, own
        self._form, self._transposed = form, transposed
        self._exact: Tensor | None = None
        self._file = file
        self._device = torch.device("cpu")
        self._emptied: tuple[nn.Parameter, Tensor] | None = None  # and what its storage is since
        self.rounded: Rounded | None = None
        """What the device holds; None while the weight is whole there."""

    @property
    def parameter(self) -> nn.Parameter:
        """The user's parameter, looked up by name: a module may be given another one."""
        parameter = self.module._parameters[self.own]
        assert parameter is not None
        return parameter

    @property
    def is_mapped(self) -> bool:
        """Whether the exact values are in a file rather than in memory."""
        return self._file is not None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the device holds of it while it is frozen."""
        return () if self.rounded is None else self.rounded.tensors

    @property
    def host_bytes(self) -> int:
        """Bytes of exact values that are kept in the host's memory."""
        return 0 if self._exact is None or self.is_mapped else self._exact.nbytes

    def exact(self) -> Tensor:
        """The exact values, not a copy: in the host's memory while the weight is frozen.

        Raises:
            ConfigError: If they are in a file that has changed; or as :meth:`check`.
        """
        if self.rounded is None or self._exact is None:
            return self.parameter.detach()
        self.check()
        if self._file is not None:
            self._file.check()
        return self._exact

    @torch.no_grad()
    def freeze(self, device: torch.device | None = None) -> None:
        """Round the weight, and keep its exact values in the host's memory.

        Args:
            device: Where the codes are, and the weight when it trains again; by default where it is.
        """
        if self.rounded is not None:
            return
        parameter = self.parameter
        values = parameter.detach()
        self._device = device or values.device
        self.rounded = self._round(values.to(self._device))
        self._exact = self._put_away(values)
        self._empty(parameter)

    def _round(self, values: Tensor) -> Rounded:
        matrices = values.unsqueeze(0) if values.dim() == 2 else values
        codes = tuple(
            self._form.quantize(matrix.t().contiguous() if self._transposed else matrix.contiguous())
            for matrix in matrices
        )
        return Rounded(self._form, codes, values.shape, values.dtype, self._transposed)

    def _put_away(self, values: Tensor) -> Tensor:
        before = self._exact
        if values.device.type == "cpu":
            return values
        if before is None or before.shape != values.shape or before.dtype != values.dtype:
            return to_host(values)
        return before.copy_(values, non_blocking=True)  # pinned memory is slow to get: it is used again

    def _empty(self, parameter: nn.Parameter) -> None:
        stub = torch.full((1,), float("nan"), dtype=parameter.dtype, device=self._device)
        parameter.data = stub.expand(parameter.shape)
        self._emptied = parameter, stub
        setattr(parameter, FROZEN, self)

    def undo(self) -> str | None:
        """Undo what somebody has done to the parameter since it was emptied; its exact values stay what they were.

        Returns:
            What was done, if anything.
        """
        if self._emptied is None:
            return None
        old, stub = self._emptied
        now = self.module._parameters.get(self.own)
        if now is old and storage_of(now) == storage_of(stub):
            return None
        # A copy of the model has made it as large as it was.
        copied = now is old and bool(now.detach().isnan().all())
        self.module._parameters[self.own] = old
        self._empty(old)
        if copied:
            return None
        return "written to" if now is old else "taken out of its module" if now is None else "replaced"

    def check(self) -> None:
        """Make sure that nobody has written to the parameter or replaced it since it was emptied.

        Raises:
            ConfigError: If somebody has; it was undone then.
        """
        if (done := self.undo()) is not None:
            raise ConfigError(left_alone({self.name: done}))

    def check_used(self) -> None:
        """Make sure, in a forward, that its codes are what the caller wants used.

        Raises:
            ConfigError: If other values were put in the weight's place, which are left to whoever takes them away
                again; if a transform of torch.func is at work, which would take the codes for constants.
        """
        if self._emptied is None:
            return
        old, stub = self._emptied
        now = self.module._parameters.get(self.own)
        if torch.compiler.is_compiling() and now is old:
            return  # a graph holds for the weight that it was traced with, and can't look at its memory
        if torch._C._are_functorch_transforms_active():
            raise ConfigError(
                f"torch.func's transforms (grad, vmap and the like) need a model's exact weights, but frozen_weights "
                f"holds {self.name} rounded: {_INSTEAD}"
            )
        if now is old:
            if storage_of(old) != storage_of(stub):
                self.check()
        elif now is None or now.requires_grad or storage_of(now) != storage_of(stub):
            # A view of the emptied weight itself, as detach() gives one, has no other values.
            raise ConfigError(
                f"A frozen weight must be the model's own in a forward while frozen_weights holds it rounded, but "
                f"another value was put in the place of {self.name} (by functional_call, a parametrization or the "
                f"like), which would be ignored: leave that weight out, {_INSTEAD}"
            )

    @torch.no_grad()
    def activate(self) -> None:
        """Give the parameter its exact values back, on its device; they may be written to."""
        if self.rounded is None:
            if self.is_mapped:  # it trains before it was ever frozen: what it becomes is in no file
                self.parameter.data = self.parameter.detach().clone()
                self._file = None
            return
        exact = self.exact()
        parameter = self.parameter
        if self._device.type != "cpu":
            parameter.data = exact.to(self._device, non_blocking=True)
        else:
            parameter.data = exact.clone() if self.is_mapped else exact
        if self.is_mapped:
            self._exact = self._file = None
        setattr(parameter, FROZEN, None)
        self.rounded = self._emptied = None

    def show(self, exact: bool) -> None:
        """Have the parameter show its exact values, in the host's memory and not to be written to; or nothing."""
        if self.rounded is None:
            return
        if exact:
            self.parameter.data, self._emptied = self.exact(), None
        elif self._emptied is None:
            self._empty(self.parameter)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow a module to another device.

        Raises:
            ConfigError: If its type changes, or it would have no values any more.
        """
        assert self.rounded is not None
        if device.type == "meta":
            raise ConfigError(
                f"A model with frozen_weights must stay on a device that holds values, but {self.name} was to go to "
                "the meta device: close() the scheduler before."
            )
        if dtype != self.rounded.dtype:
            raise ConfigError(
                f"A model with frozen_weights must keep its type, which is {self.rounded.dtype} for {self.name}, but "
                f"was to become {dtype}: convert the model before LayerScheduler is made."
            )
        self.rounded, self._device = self.rounded.to(device), device
        self._empty(self.parameter)

    @torch.no_grad()
    def begin_loading(self, values: Tensor) -> tuple[Tensor | None, MappedFile | None] | None:
        """Make the parameter writable for some values to be loaded.

        Returns:
            What :meth:`end_loading` takes: where the values are already, if a file has the same.
        """
        same = None
        if self.is_mapped:
            exact = self.exact()
            if (
                values.dtype == exact.dtype
                and values.shape == exact.shape
                and torch.equal(values.cpu(), exact)
            ):
                same = self._exact, self._file
        self.activate()
        return same

    def end_loading(self, same: tuple[Tensor | None, MappedFile | None] | None) -> None:
        """Round what was loaded."""
        self.freeze()
        if same is not None:
            self._exact, self._file = same


def left_alone(done: dict[str, str]) -> str:
    """What to say of frozen weights that somebody else has changed.

    Args:
        done: What was done, by name of the parameter.
    """
    return (
        f"Frozen weights must be left alone while frozen_weights holds them rounded, but "
        f"{some((f'{name} was {what}' for name, what in done.items()), 3)}. Their exact values are elsewhere, so this "
        "was undone: give them others by model.load_state_dict(..., strict=False), or close() the scheduler before."
    )


def storage_of(tensor: Tensor) -> int:
    """What two tensors have in common that share their memory, without a look at it: also those of a plan have it."""
    address: int = tensor.untyped_storage()._cdata
    return address
