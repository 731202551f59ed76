"""OWL's layer outlier distribution: how many weights of a layer stand out once scaled by their inputs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layersample.bf16_products import fast_products
from layersample.errors import ConfigError
from layersample.layers.find import ModelLayers, find_layers
from layersample.layers.unchanged import unchanged
from layersample.metrics.expert_inputs import watch_experts
from layersample.metrics.matrices import WeightMatrix, weight_matrices
from layersample.metrics.spectrum import check_weight
from layersample.sampling.calibration import OwnLoss
from layersample.sampling.pace import PROGRESS
from layersample.unwrapping import exact_model, unwrap

DEFAULT_THRESHOLDS = (3.0, 5.0, 7.0, 10.0, 13.0)


def outlier_ratios(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    layers: ModelLayers | None = None,
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
) -> dict[str, dict[float, float]]:
    """Return the share of outliers of each layer, in percent, for several thresholds in one pass.

    The score of a weight is A_ij = |W_ij|·‖X_j‖₂, with the norm over all calibration tokens of the input
    channel j. D_l = 100 · #{A > M·mean(A)} / numel over all linear weights of layer l together. OWL uses M
    from 3 to 10, OwLore's file for LLaMA2-7B M = 13.

    Only a sum of squares per input channel is kept, never an activation. Tokens that a 2-D
    ``attention_mask`` leaves out don't count, except inside of experts, where the tokens of a batch are
    mixed. The model runs in eval mode without gradients; its mode, hooks and experts' implementation are
    those of before when this returns or raises. On a CPU without bf16 instructions bf16 products are computed in fp32
    and rounded, see :func:`~layersample.fast_products`.

    Args:
        model: Any model that ``find_layers`` works on.
        batches: What the model is called with: mappings are its keyword arguments, a tensor its first
            argument. They are moved to the model's device. Leave ``labels`` out to save the loss.
        layers: The model's layers; found by default.
        thresholds: M, each positive.

    Returns:
        For each layer by name, in order, {M: percent}.

    Raises:
        ConfigError: If there are no batches or thresholds, a threshold isn't positive, an input isn't
            finite, or a layer saw no input or is all zero.

    References:
        OWL, arXiv 2310.05175; OwLore, arXiv 2405.18380; the score is Wanda's, arXiv 2306.11695.
    """
    limits = _check_thresholds(thresholds)
    model = unwrap(model)
    layers = find_layers(model) if layers is None else layers
    with exact_model(model):
        return _measure(model, layers, batches, limits)


def _measure(
    model: nn.Module,
    layers: ModelLayers,
    batches: Iterable[Mapping[str, Any] | Tensor],
    limits: Sequence[float],
) -> dict[str, dict[float, float]]:
    inputs = _ChannelNorms(model, weight_matrices(model, layers))
    count = 0
    # Around what listens to experts, which must see the weights themselves.
    with unchanged(model), fast_products(model, PROGRESS.info), inputs.listening(model), torch.no_grad():
        model.eval()
        for batch in batches:
            _run(model, batch, inputs)
            count += 1
    if count == 0:
        raise ConfigError("batches must hold at least one calibration batch, but got none.")
    return {layer.name: _score_layer(layer.name, inputs, limits) for layer in layers.layers}


def _check_thresholds(thresholds: Sequence[float]) -> list[float]:
    limits = list(thresholds)
    if not limits or not all(limit > 0 for limit in limits):
        raise ConfigError(f"thresholds must be one or more positive numbers, but got {thresholds}.")
    return limits


class _ChannelNorms:
    """Sums of squares of the inputs of linear weights, per input channel."""

    def __init__(self, model: nn.Module, matrices: Sequence[WeightMatrix]) -> None:
        modules = dict(model.named_modules())
        self.hears = False  # only while a batch runs, and not while the next one is made
        self.mask: Tensor | None = None  # (batch, tokens) of the batch that runs, where it has padding
        self.by_layer: dict[str, list[WeightMatrix]] = {}
        self.squares: dict[str, Tensor] = {}  # (in,) of each matrix, by name
        self._by_column: dict[str, bool] = {}  # whether a matrix's second dimension is the input
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._linears: dict[str, nn.Module] = {}
        self._fused: dict[str, Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        for matrix in matrices:
            path, _, own = matrix.parameter.rpartition(".")
            # An embedding looks rows up: it has no inputs to scale by.
            if isinstance(modules[path], nn.Embedding) or (matrix.expert is None and own != "weight"):
                continue
            check_weight(matrix.weight)
            self._shapes[matrix.name] = tuple(matrix.weight.shape)
            self.by_layer.setdefault(matrix.layer, []).append(matrix)
            if matrix.expert is None:
                self._linears[matrix.name] = modules[path]
            else:
                self._fused[matrix.parameter] = model.get_parameter(matrix.parameter)

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Add up what the model is fed until the end of the block."""
        from transformers.pytorch_utils import Conv1D

        with contextlib.ExitStack() as stack:
            for name, module in self._linears.items():
                hook = self._hook(name, by_column=not isinstance(module, Conv1D))
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(watch_experts(model, self._fused, self._see_expert))
            yield
        self._last = None

    def scores(self, matrix: WeightMatrix) -> tuple[Tensor, Tensor] | None:
        """|W| and the norm of each of its input channels, shaped to be multiplied; None without inputs."""
        squares = self.squares.get(matrix.name)
        if squares is None:
            return None
        norms = squares.sqrt()
        weight = (
            matrix.weight.abs().float().to(norms.device)
        )  # exact values of a frozen one are in the host's memory
        return weight, norms if self._by_column[matrix.name] else norms[:, None]

    def _hook(self, name: str, by_column: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(name, args[0] if args else next(iter(kwargs.values())), by_column)

        return hook

    def _see_expert(self, parameter: str, expert: int, inputs: Tensor, by_column: bool) -> None:
        self._add(f"{parameter}[{expert}]", inputs, by_column)

    def _add(self, name: str, inputs: Tensor, by_column: bool) -> None:
        if (
            not self.hears or inputs.shape[-1] != self._shapes[name][1 if by_column else 0]
        ):  # not an input of this weight
            return
        squares = self._sum_squares(inputs)
        self._by_column[name] = by_column
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares

    def _sum_squares(self, inputs: Tensor) -> Tensor:
        # Queries, keys and values read one tensor: don't read it three times. A weak reference holds nothing.
        if self._last is not None and self._last[0]() is inputs and self._last[1] == inputs._version:
            return self._last[2]
        flat = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in)
        if self.mask is not None and inputs.shape[:-1] == self.mask.shape:
            flat = flat[self.mask.reshape(-1)]
        # Ten times faster on a CPU than vector_norm along the tokens.
        squares = flat.detach().float().square().sum(0)  # (in,)
        self._last = (weakref.ref(inputs), inputs._version, squares)
        return squares


def _score_layer(layer: str, inputs: _ChannelNorms, thresholds: Sequence[float]) -> dict[float, float]:
    matrices = inputs.by_layer.get(layer, [])
    if not any(matrix.name in inputs.squares for matrix in matrices):
        raise ConfigError(
            f"Each layer must take part in the model's forward, but no weight of {layer} saw any input."
        )
    # An expert that no token went to has scores of zero, and counts.
    total = sum(matrix.weight.numel() for matrix in matrices)
    seen = [matrix for matrix in matrices if matrix.name in inputs.squares]
    mean = sum(float(_multiply(inputs, m).sum()) for m in seen) / total
    if not 0.0 < mean < float("inf"):
        raise ConfigError(
            f"The weights and inputs of {layer} must be finite and not all zero, but the mean of their "
            f"products is {mean}."
        )
    counts = dict.fromkeys(thresholds, 0)
    for matrix in seen:
        score = _multiply(inputs, matrix)
        large = score[score > min(thresholds) * mean]  # few: the other thresholds need look at these only
        for threshold in thresholds:
            counts[threshold] += int((large > threshold * mean).sum())
    return {threshold: 100.0 * count / total for threshold, count in counts.items()}


def _multiply(inputs: _ChannelNorms, matrix: WeightMatrix) -> Tensor:
    scores = inputs.scores(matrix)
    assert scores is not None
    weight, norms = scores
    return weight.mul_(norms)


def _run(model: nn.Module, batch: Mapping[str, Any] | Tensor, inputs: _ChannelNorms) -> None:
    inputs.hears = True
    try:
        _forward(model, batch, inputs)
    finally:
        inputs.hears = False


def _forward(model: nn.Module, batch: Mapping[str, Any] | Tensor, inputs: _ChannelNorms) -> None:
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        inputs.mask = None
        model(batch.to(device))
    elif isinstance(batch, OwnLoss):
        # What the model is called with shows only there.
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.mask = _padding(kwargs.get("attention_mask"))

        with model.register_forward_pre_hook(see, with_kwargs=True):
            batch.compute(model)
    elif isinstance(batch, Mapping):
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        inputs.mask = _padding(moved.get("attention_mask"))
        model(**moved)
    else:
        raise ConfigError(f"Each batch must be a mapping or a tensor, but got {type(batch).__name__}.")


def _padding(mask: object) -> Tensor | None:
    """Which tokens count (batch, tokens), where not all do."""
    is_padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
    return mask.bool() if is_padded and isinstance(mask, Tensor) else None
