"""Cross-entropy of a linear head in chunks of positions: logits never exist whole, in forward or backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layersample.unwrapping import is_dtensor

_BLOCK = 8192  # rows of the vocabulary
# float16 holds nothing below 6e-8: there gradients are formed as this times those of a sum of losses, whose size is
# at most this for any number of positions; what a loss scaler multiplies by is only known in backward.
_FLOAT16_GAIN = 16.0


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: ``softcap · tanh(scale · x / softcap)``, or ``scale · x``.

    Args:
        scale: Factor of the logits.
        softcap: Bound of the logits; ``None`` where there is none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits."""
        scaled = logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform logits in place; return the derivative of a softcap, where there is one."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(self.softcap)
        return slope


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform | None = None,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_size: int = 128,
) -> Tensor:
    """The cross-entropy of ``hidden @ weight.T + bias``, with its gradients formed in the forward pass.

    Positions without a label are left out before the head. The others go through it ``chunk_size`` at a time;
    each chunk's logits become its gradients in place and are forgotten, so nothing is computed twice. Under
    16-bit weights the softmax is in float32 as in transformers, and a head that trains collects its gradient
    in its own type, one rounding a chunk; in float16, which loss scaling is for, in float32.

    Args:
        hidden: Input of the head, ``(..., hidden_size)``.
        weight: Weight of the head, ``(vocabulary, hidden_size)``; a sharded one is gathered.
        bias: Bias of the head, ``(vocabulary,)``, or none.
        targets: Token ids, of hidden's leading shape; ``ignore_index`` where there is no label.
        transform: What the model does to the logits.
        num_items: What the sum over positions is divided by; their number by default.
        ignore_index: The target of a position that doesn't count.
        chunk_size: Positions at a time, at least 1. Memory is chunk_size · vocabulary · 4 bytes, and 2 more
            under 16 bits.

    Returns:
        The loss, a scalar; in float32 for 16-bit input. Backward can go through it once.

    References:
        Gradients in the forward pass: Liger Kernel, arXiv 2410.10989.
    """
    weight, bias = _gather(weight), None if bias is None else _gather(bias)
    if not torch.is_grad_enabled():  # an autograd function isn't told, and would form gradients for nobody
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    hidden, targets = _labelled(hidden, targets.to(hidden.device), ignore_index)
    if num_items is None:
        num_items = len(targets)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, transform or LogitTransform(), num_items, chunk_size
    )
    return loss


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The label of each position: the next token; the last position has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _gather(tensor: Tensor) -> Tensor:
    """A tensor as it is; of a shard, the whole, whose gradient is the mean over ranks, as FSDP's own is."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _labelled(hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The positions that have a label: hidden ``(n, hidden_size)`` and targets ``(n,)``."""
    from torch._subclasses.fake_tensor import FakeTensor

    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if isinstance(targets, FakeTensor):  # no values to look at: a plan counts every position
        return hidden, targets
    rows = torch.nonzero(targets != ignore_index).flatten()
    if len(rows) == len(targets):
        return hidden, targets
    return hidden.index_select(0, rows), targets.index_select(0, rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        num_items: Tensor | int,
        chunk_size: int,
    ) -> Tensor:
        head = _Head(hidden.dtype, weight, bias, min(chunk_size, max(len(hidden), 1)), ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=head.softmax_type, device=hidden.device)
        # As a tensor of that type: a quotient with an integer tensor would be rounded to float32.
        items = torch.as_tensor(num_items, dtype=total.dtype, device=total.device)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            into = None if grad_hidden is None else grad_hidden[rows]
            total += head.chunk(hidden[rows], targets[rows], transform, head.gain(transform, items), into)
        ctx.gradients = (grad_hidden, head.grad_weight, head.grad_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        # What the gradients lack of the mean's, to be made up for with the gradient of the loss.
        ctx.lacking = transform.scale / (items * _FLOAT16_GAIN) if head.is_float16 else None
        return total / items

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "Backward can go once through a chunked loss, because its gradients are then given away; "
                "compute the loss again."
            )
        # Given away, so that nothing but the parameter holds them: autograd need not copy.
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.lacking is None:
            scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in gradients]
        else:  # the scaler's factor is beyond float16
            factor = grad_loss.float() * ctx.lacking
            scaled = [
                None if g is None else g.float().mul_(factor).to(dtype)
                for g, dtype in zip(gradients, ctx.types, strict=True)
            ]
        return (*scaled, None, None, None, None)


class _Head:
    """The linear head with its two buffers and the gradients that it collects."""

    def __init__(
        self,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        needs_grad: tuple[bool, ...],
    ) -> None:
        self._weight = weight.to(dtype)  # another type only under autocast
        self._bias = None if bias is None else bias.to(dtype)
        self._needs_any = any(needs_grad[:3])
        self.softmax_type = torch.promote_types(dtype, torch.float32)
        shape = (chunk_size, len(weight))
        self._logits = torch.empty(shape, dtype=dtype, device=weight.device)
        is_half = dtype != self.softmax_type
        self._exact = self._logits.to(self.softmax_type) if is_half else self._logits
        self.is_float16 = dtype == torch.float16
        wide = torch.float32 if self.is_float16 else None  # for sums over all positions
        self.grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_grad[2] else None

    def gain(self, transform: LogitTransform, num_items: Tensor) -> Tensor | float:
        """What the gradient of a position's softmax is multiplied by."""
        return _FLOAT16_GAIN if self.is_float16 else transform.scale / num_items

    def chunk(
        self,
        hidden: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        gain: Tensor | float,
        grad_hidden: Tensor | None,
    ) -> Tensor:
        """Add a chunk's gradients and return the sum of its losses; hidden is ``(n, hidden_size)``."""
        logits, exact = self._logits[: len(hidden)], self._exact[: len(hidden)]  # (n, vocabulary)
        torch.mm(hidden, self._weight.t(), out=logits)
        if self._bias is not None:
            logits.add_(self._bias)
        if exact is not logits:
            exact.copy_(logits)
        slope = transform.apply_(exact)
        columns = targets.unsqueeze(1)  # (n, 1)
        largest = exact.amax(-1, keepdim=True)
        of_target = exact.gather(1, columns) - largest
        sums = exact.sub_(largest).exp_().sum(-1, keepdim=True)
        losses = (sums.log() - of_target).sum()
        if not self._needs_any:
            return losses
        # The gradient of the mean: (softmax - one-hot) / num_items, but for what float16 leaves to backward.
        exact.div_(sums).scatter_add_(1, columns, exact.new_full(columns.shape, -1.0))
        exact.mul_(gain)
        if slope is not None:
            exact.mul_(slope)
        if exact is not logits:
            logits.copy_(exact)
        self._add_gradients(hidden, logits, grad_hidden)
        return losses

    def _add_gradients(self, hidden: Tensor, grad_logits: Tensor, grad_hidden: Tensor | None) -> None:
        if grad_hidden is not None:
            torch.mm(grad_logits, self._weight, out=grad_hidden)
        if self.grad_weight is not None:
            if self.grad_weight.dtype == hidden.dtype:
                self.grad_weight.addmm_(grad_logits.t(), hidden)
            else:  # autocast; in blocks, because the product has another type than the sum
                blocks = zip(
                    torch.split(self.grad_weight, _BLOCK),
                    torch.split(grad_logits, _BLOCK, dim=1),
                    strict=True,
                )
                for total, part in blocks:
                    total += part.t() @ hidden
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0)
