"""Exact fp32 values behind bf16 weights: a master while a weight trains, a 16-bit remainder while it is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layersample.optim.host_copies import to_host
from layersample.unwrapping import is_fake

# Keys in an optimizer's state of a parameter, whose other keys are the optimizer's: so none of them may be like these.
MASTER = "layersample_master"
REMAINDER = "layersample_remainder"
EXCEPTIONS = "layersample_exceptions"
EXCEPTION_VALUES = "layersample_exception_values"
AT_REST = (REMAINDER, EXCEPTIONS, EXCEPTION_VALUES)
_PIECE = 2**18  # elements: a megabyte of fp32
OLD_NAMES = {
    "master_weight": MASTER,
    "master_remainder": REMAINDER,
    "master_exceptions": EXCEPTIONS,
    "master_exception_values": EXCEPTION_VALUES,
}
"""What checkpoints of an older version name them."""


def split(master: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Keep what rounding to bf16 has lost: two bytes an element, on the CPU.

    The remainder is the difference of the bit patterns as integers, so that subnormals and values that round
    to infinity need no care. Rounding to the nearest leaves a difference from -2¹⁵ to 2¹⁵: one value more than
    16 bits hold, which ties make about once in 10⁵ elements. Those, NaN, and what rounds to zero without being zero
    are listed whole: a weight of zero has no remainder, so that one that is pruned later is zero exactly. Any other
    difference that doesn't fit is of a weight that was changed behind its master, which then wins.

    Args:
        master: fp32 values, any shape.
        weight: bf16, the same shape: the master, rounded, but where someone has changed it since.

    Returns:
        the remainder (int16, the same shape) and, where there are any, exceptions (int64 positions in the
        flattened tensor) and their values (fp32).
    """
    difference = master.view(torch.int32) - _bits(weight)
    remainder = difference.to(torch.int16)  # wraps around where it doesn't fit
    if _is_on_cpu(weight) and _has_no_zero(weight):
        unfit = remainder.to(torch.int32).bitwise_xor_(difference)
    else:
        unfit = (remainder != difference) | ((weight == 0) & (difference != 0))
    wrong = unfit.flatten().nonzero().flatten()
    exceptions: dict[str, Tensor] = {}
    if wrong.numel():
        values = master.flatten()[wrong]
        agree = _agree(values, weight.flatten()[wrong])
        remainder[torch.unravel_index(wrong, remainder.shape)] = 0
        wrong, values = wrong[agree], values[agree]
        if wrong.numel():
            exceptions = {EXCEPTIONS: wrong.cpu(), EXCEPTION_VALUES: values.cpu()}
    return {REMAINDER: to_host(remainder), **exceptions}


def combine(weight: Tensor, state: dict[str, Any]) -> Tensor:
    """The exact fp32 values of a bf16 weight.

    Args:
        weight: The weight, any shape.
        state: What the optimizer's state of it holds: its master, what :func:`split` kept, or neither where the
            weight hasn't trained yet.

    Returns:
        fp32, the same shape: the master itself where there is one, whatever the weight is by now (see
        :func:`follow`). What is made of a remainder rounds to the weight, also where that was changed since; where
        the weight is zero, or can't be what the remainder is of, it is the weight.
    """
    if MASTER in state:
        master: Tensor = state[MASTER]
        return master
    if REMAINDER not in state:
        return weight.detach().float()
    bits: Tensor = _bits(weight.detach()) + state[REMAINDER].to(weight.device, non_blocking=True)
    exact: Tensor = bits.view(torch.float32)
    # A weight that was written since may be anything: the bits of zero minus one are those of a NaN, infinity's plus
    # one as well, and a tie rounds to the even neighbour alone.
    written = weight.detach()
    if not (
        _is_on_cpu(weight)
        and _has_no_zero(written)
        and _same(_integers(exact.bfloat16()), _integers(written))
    ):
        torch.where(_agree(exact, written) & (written != 0), exact, written, out=exact)
    if EXCEPTIONS in state:
        places = state[EXCEPTIONS].to(weight.device)
        values = state[EXCEPTION_VALUES].to(weight.device)
        # They are whole values, which wouldn't follow a changed weight as remainders do.
        are = written.flatten()[places]
        # put_ has no deterministic implementation.
        exact[torch.unravel_index(places, exact.shape)] = torch.where(_agree(values, are), values, are)
    return exact


def add(weight: Tensor, state: dict[str, Any], change: Tensor, *, alpha: float) -> dict[str, Tensor]:
    """Add to the exact values of a frozen bf16 weight, and round it anew in place.

    On a CPU it is done in pieces that stay in its cache, since it takes a dozen passes: that is faster, and takes
    little memory besides the result.

    Args:
        weight: The weight, any shape; not a DTensor, whose pieces would be copies.
        state: What :func:`split` kept of it; may hold other keys, but no master.
        change: What is added, any floating-point type, the same shape.
        alpha: By what it is multiplied before.

    Returns:
        What :func:`split` keeps of the result.
    """
    if not _is_on_cpu(weight) or not weight.is_contiguous() or weight.numel() <= _PIECE:
        exact = combine(weight, state)
        exact.add_(change.float(), alpha=alpha)
        weight.copy_(exact)
        return split(exact, weight)
    flat, changes = weight.view(-1), change.flatten()
    before = {key: value.flatten() for key, value in at_rest(state).items()}
    remainder, exceptions = torch.empty_like(flat, dtype=torch.int16), []
    for begin in range(0, flat.numel(), _PIECE):
        end = begin + _PIECE
        kept = add(flat[begin:end], _part(before, begin, end), changes[begin:end], alpha=alpha)
        remainder[begin:end] = kept[REMAINDER]
        if EXCEPTIONS in kept:
            exceptions.append((kept[EXCEPTIONS] + begin, kept[EXCEPTION_VALUES]))
    after = {REMAINDER: remainder.view(weight.shape)}
    if exceptions:
        places, values = zip(*exceptions, strict=True)
        after |= {EXCEPTIONS: torch.cat(places), EXCEPTION_VALUES: torch.cat(values)}
    return after


def _part(state: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """What :func:`split` would have kept of some elements, of what it kept of a flat weight."""
    part: dict[str, Tensor] = {}
    if REMAINDER in state:
        part[REMAINDER] = state[REMAINDER][begin:end]
    if EXCEPTIONS in state:
        first, last = torch.searchsorted(
            state[EXCEPTIONS], torch.tensor([begin, end])
        ).tolist()  # they ascend
        part[EXCEPTIONS] = state[EXCEPTIONS][first:last] - begin
        part[EXCEPTION_VALUES] = state[EXCEPTION_VALUES][first:last]
    return part


def follow(master: Tensor, weight: Tensor) -> Tensor:
    """Take over, in place, what was written to a bf16 weight behind its master: wherever they disagree.

    Args:
        master: fp32 values, any shape.
        weight: The weight, the same shape.

    Returns:
        The master.
    """
    weight = weight.detach()
    return torch.where(_agree(master, weight), master, weight, out=master)


def at_rest(state: dict[str, Any]) -> dict[str, Tensor]:
    """The part of a parameter's optimizer state that must outlive its being frozen."""
    return {key: state[key] for key in AT_REST if key in state}


def _agree(exact: Tensor, weight: Tensor) -> Tensor:
    """Where fp32 values round to bf16 ones."""
    rounded = exact.to(weight.dtype)
    return (rounded == weight) | (rounded.isnan() & weight.isnan())


# Nearly always no weight is a special case. Integers find that in a fraction of the time of comparisons, which CPUs
# don't vectorize. A GPU would wait for the answer.


def _is_on_cpu(weight: Tensor) -> bool:
    """Whether a weight's values are on a CPU; those of a plan are nowhere, and are planned for a GPU."""
    return weight.is_cpu and not is_fake(weight)


def _has_no_zero(weight: Tensor) -> bool:
    """Whether no bf16 value is 0 or -0."""
    return int(torch.count_nonzero(_integers(weight) & 0x7FFF)) == weight.numel()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of integers are equal."""
    return not int(torch.count_nonzero(one ^ other))


def _integers(weight: Tensor) -> Tensor:
    """The bit patterns of bf16 values, as int16."""
    return weight.detach().view(torch.int16)


def _bits(weight: Tensor) -> Tensor:
    """The bit patterns of bf16 values, widened to fp32, as int32."""
    high: Tensor = _integers(weight).to(torch.int32)
    return torch.bitwise_left_shift(high, torch.tensor(16, dtype=torch.int32))
