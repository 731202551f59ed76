"""Calibration batches: what samplers that measure with data are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from layersample.errors import ConfigError

Batches = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
"""Mappings of the model's arguments, in an iterable that can be read more than once, or a function that gives one."""


class OwnLoss(dict[str, Any]):
    """A batch whose loss a training loop computes by itself, and not the model: pairs, or answers with rewards.

    As a mapping it is what the loop's loss is computed from, which the model needn't take.

    Args:
        inputs: What the loss is computed from.
        compute: The loss, given the model.
    """

    def __init__(self, inputs: Mapping[str, Any], compute: Callable[[nn.Module], Tensor]) -> None:
        super().__init__(inputs)
        self.compute = compute


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a calibration batch.

    Args:
        model: The model.
        batch: Its arguments, labels among them; or an :class:`OwnLoss`.

    Raises:
        ConfigError: If the model gives no loss.
    """
    if isinstance(batch, OwnLoss):
        return batch.compute(model)
    device = next(model.parameters()).device
    output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "A sampler that measures by the loss needs batches that the model gives one for, with labels, but it gave "
            "none. Of a Trainer with a loss of its own (TRL's), use LayerSamplingCallback(...).attach(trainer)."
        )
    return loss


def reader_of(batches: Batches | None) -> Callable[[], Iterable[Mapping[str, Any]]] | None:
    """A function that gives the calibration batches anew at each call.

    Raises:
        ConfigError: If they can be read once only. Of a loader of a stream that shows when it is read: what is behind
            two readings can't be seen before.
    """
    if batches is None or callable(batches):
        return batches
    iterator = iter(batches)
    if iterator is batches or iterator is iter(batches):
        raise ConfigError(
            f"batches must be readable more than once, but got {type(batches).__name__}, which is empty after the "
            "first time: give a list, a loader, or a function that makes a new iterator. Of a stream, read the first "
            "ones into a list, and train on both: first = list(islice(stream, 8)); stream = chain(first, stream)."
        )
    stream = getattr(batches, "dataset", None)
    if stream is None or is_indexed(stream):
        return lambda: batches

    def read() -> Iterable[Mapping[str, Any]]:
        first_of_two_readings(stream)  # a loader of it reads it anew
        return batches

    return read


def is_indexed(dataset: Any) -> bool:
    """Whether a dataset gives its examples by number, and not as a stream."""
    if isinstance(dataset, IterableDataset):  # whose base has a __getitem__ that raises
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def first_of_two_readings(stream: Iterable[Any]) -> Iterator[Any]:
    """Read a stream that is to be read again later, by somebody else.

    Raises:
        ConfigError: If a second reading doesn't begin where the first did, or its reader would go on behind it.
    """
    rows = iter(stream)
    first = [] if rows is stream else list(islice(rows, 1))
    if rows is stream or (first and not _is_same(first, list(islice(iter(stream), 1)))):
        raise ConfigError(
            f"The sampler measures with the first training examples, so the training data must be the same each time "
            f"it is read, but a second reading of {type(stream).__name__} doesn't begin with the first example: what "
            "was measured would never train. Give data that can be read again, such as a datasets.Dataset or "
            "datasets.IterableDataset, load it without workers in one process (dataloader_num_workers=0) in the "
            "Trainer, or choose a sampler or options that need no data."
        )
    return chain(first, rows)


def _is_same(one: object, other: object) -> bool:
    """Whether two examples are equal, tensors and arrays in them too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str | bytes):
        return len(one) == len(other) and all(map(_is_same, one, other))
    equal = one == other
    return bool(getattr(equal, "all", lambda: equal)())
