"""The chunked loss in a transformers model: its own forward runs, but for the head and the loss."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from layersample.activations.chunked_cross_entropy import LogitTransform, chunked_cross_entropy, shift_labels
from layersample.activations.chunked_fit import head_of, inner_model, why_not_by_look, why_not_its_head
from layersample.activations.replay import Replay
from layersample.errors import ConfigError
from layersample.notices import warn_once
from layersample.option_files import Options, make_options
from layersample.options import MOST, option
from layersample.unwrapping import is_dtensor

logger = logging.getLogger(__name__)

_REFUSED = (
    "A chunked loss can't take the place of this model's own: {}. Train it without: loss_chunk=None, or "
    "--loss-chunk 0 of the command line."
)

# What the head gives in place of logits; the model's own forward then shows what it does to them.
_PROBES = (0.0, 1e-6, 1.0, -1.0, 3.0, 40.0, 1e30)


class _Chunks(Options):
    chunk_size: int = option(128, "Positions at a time.", ge=1, le=MOST)


class ChunkedLoss:
    """Makes a causal language model compute its loss from a few positions' logits at a time.

    While the model trains and is called with labels, ``model(**batch).loss`` is ``chunked_cross_entropy``:
    the same loss and gradients, and no ``logits`` in the output. In eval mode, without labels, or where a call asks
    for logits (``logits_to_keep``, ``return_dict=False``), nothing changes. The rest of the model's forward runs as it
    is, label shift, ``num_items_in_batch``, auxiliary losses and autocast included. What it does to its logits (a
    scale, a softcap) is found by what it does to a few numbers.

    Whether the model's loss is nothing else (it may use its logits afterwards, in a z-loss say, or compute its loss by
    itself) shows in a trial: four tokens go through its layers when this is made, and from there to its loss with and
    without. The two losses must be the same. Under FSDP there is no trial.

    TRL's trainers bring a fused head of their own and don't ask for the model's loss; they are left alone.

    Args:
        model: A causal language model of transformers, as it is or wrapped by PEFT, DDP or ``torch.compile``.
        chunk_size: Positions at a time, at least 1; memory is chunk_size · vocabulary · 4 bytes.

    Raises:
        ConfigError: If the model has no linear head, or its loss isn't that of the next token alone; it says
            why. :func:`why_not_chunked` tells without raising.

    Example:
        >>> with ChunkedLoss(model):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
    """

    def __init__(self, model: nn.Module, *, chunk_size: int = 128) -> None:
        chunk_size = make_options(_Chunks, [("", {"chunk_size": chunk_size})], "argument").chunk_size
        self._model = inner_model(model)
        reason = why_not_by_look(self._model)
        if reason is not None:
            raise ConfigError(_REFUSED.format(reason))
        self._head: nn.Linear = self._model.get_output_embeddings()
        self._chunk_size = chunk_size
        self._transform: LogitTransform | None = None
        self._hidden: Tensor | None = None
        self._asked, self._answered, self._paused = False, False, False
        self._loss_before = self._model.__dict__.get("_loss_function")
        self._handles = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        vars(self._head)["forward"] = self._forward_head
        self._original_loss = self._model.loss_function
        self._model.loss_function = self._loss
        try:
            reason = self._try()
        except BaseException:
            self.close()
            raise
        if reason is not None:
            self.close()
            raise ConfigError(_REFUSED.format(reason))

    def close(self) -> None:
        """Put the model's own head and loss back. Safe to call twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(self._head).pop("forward", None)
        if self._loss_before is None:
            del self._model._loss_function
        else:
            self._model.loss_function = self._loss_before

    @torch.no_grad()
    def _try(self) -> str | None:
        """Compare the two losses of a few tokens, without a trace; return why they aren't the same."""
        weight = self._head.weight
        if isinstance(weight, FakeTensor) or weight.is_meta:  # of a plan
            return None
        # FSDP notes what its units need in the first forward, and leaves the root's gathered behind one that has no
        # gradients: shards are for the training loop to gather first.
        if any(is_dtensor(parameter) for parameter in self._model.parameters()) or _has_fsdp1(self._model):
            return None
        # Ids below the number of probes: a model that looks its labels up in what it takes for logits finds them.
        tokens = torch.tensor([[1, 2, 3, 1]], device=_device_of(self._model))
        batch = {"input_ids": tokens, "labels": tokens.clone()}
        modes = {module: module.training for module in self._model.modules()}
        state = torch.get_rng_state()
        layers = self._model.base_model
        below_head = Replay(layers) if layers is not self._model else None
        try:
            self._model.eval()  # no dropout, no counts that change; but what the model itself does in training
            self._model.training = True
            own = self._own_loss(batch)
            if own is None:
                return None
            if below_head is not None:
                below_head.replay()
                if self._why_not_same(own, batch) is None:
                    return None
                # It may write to what its layers gave, or take away what they leave elsewhere.
                below_head.close()
            return self._why_not_same(own, batch)
        finally:
            if below_head is not None:
                below_head.close()
            # torch 2.8 keeps what autocast has cast without gradients, and the caller's forward would train none.
            torch.clear_autocast_cache()
            torch.set_rng_state(state)
            for module, training in modes.items():
                module.training = training

    def _own_loss(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The model's own loss of a batch; ``None`` where it needs more than tokens, and can't be tried."""
        self._paused = True
        try:
            loss = self._model(**batch).loss
        except Exception as error:
            logger.debug("%s can't be tried on a few tokens: %s", type(self._model).__name__, error)
            return None
        finally:
            self._paused = False
        return loss if isinstance(loss, Tensor) else None

    def _why_not_same(self, own: Tensor, batch: dict[str, Tensor]) -> str | None:
        """Why a batch's loss in chunks isn't the model's own; ``None`` where it is."""
        name = type(self._model).__name__
        try:
            chunked = self._model(**batch).loss
        except ConfigError:
            raise
        except Exception as error:  # of the model's own code, on what it takes for logits
            if not self._answered:
                return _goes_around(self._model)
            return f"{name} does more with its logits ({type(error).__name__}: {error})"
        tolerance = 1e-4 if self._head.weight.itemsize >= 4 else 3e-2
        if torch.allclose(chunked.double(), own.double(), rtol=tolerance, atol=tolerance):
            return None
        return (
            f"{name} does more with its logits than the loss of the next token: of four tokens its own loss is "
            f"{float(own):.6g}, and {float(chunked):.6g} in chunks"
        )

    def __enter__(self) -> ChunkedLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        has_labels = kwargs.get("labels") is not None
        self._answered = False
        self._asked = module.training and has_labels and not self._paused and not kwargs.get("fused_lm_head")
        if not self._asked:
            return
        reason = _why_its_own(kwargs)
        if reason is not None:
            self._asked = False
            warn_once(logger, module, "The model computes its own loss where %s: not in chunks.", reason)
            return
        self._follow_head()

    def _follow_head(self) -> None:
        """Take the model's head of now: ``resize_token_embeddings`` and others make a new one."""
        head = head_of(self._model)
        if head is self._head:
            return
        reason = why_not_its_head(self._model)
        if reason is not None:
            self.close()
            raise ConfigError(_REFUSED.format(f"{reason}, since the head was replaced"))
        vars(self._head).pop("forward", None)
        self._head = head
        vars(self._head)["forward"] = self._forward_head

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        asked, self._asked, self._hidden = self._asked, False, None
        if not asked or output is None:  # no output where the forward has failed
            return
        if not self._answered:
            raise RuntimeError(_REFUSED.format(_goes_around(module)))
        if hasattr(output, "logits"):
            output.logits = None  # the probes, of no use to anyone

    def _forward_head(self, hidden: Tensor) -> Tensor:
        if not self._asked:
            return nn.functional.linear(hidden, self._head.weight, self._head.bias)
        self._hidden = hidden
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        probes = torch.tensor(_PROBES, dtype=dtype, device=hidden.device)
        return probes.expand(*hidden.shape[:-1], -1)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self._asked:
            loss: Tensor = self._original_loss(
                logits,
                labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
            return loss
        assert self._hidden is not None
        if self._transform is None:
            self._transform = _find_transform(logits, type(self._model).__name__)
        self._answered = True
        positions = self._hidden.numel() // self._hidden.shape[-1]
        given = (labels if shift_labels is None else shift_labels).numel()
        if given != positions:
            raise ValueError(
                f"The loss needs a label for each of the {positions} positions that go through the head (-100 where "
                f"there is none), but got {given} labels."
            )
        return chunked_cross_entropy(
            self._hidden,
            self._head.weight,
            self._head.bias,
            # Not in a variable, which would hold it for as long as the loss is computed.
            _shift(labels, ignore_index) if shift_labels is None else shift_labels,
            transform=self._transform,
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            chunk_size=self._chunk_size,
        )


_shift = shift_labels  # the loss has an argument of that name


def why_not_chunked(model: nn.Module) -> str | None:
    """Why a model can't have a chunked loss, in a sentence; ``None`` where it can.

    Args:
        model: The model, as it is or wrapped. It is as it was afterwards.
    """
    try:
        ChunkedLoss(model).close()
    except ConfigError as error:
        return str(error)
    return None


def _why_its_own(arguments: dict[str, Any]) -> str | None:
    """Why a call wants the model's own loss and logits, or ``None``."""
    keep = arguments.get("logits_to_keep")
    if keep is not None and not (isinstance(keep, int) and keep == 0):
        return "logits_to_keep asks for some of its logits"
    return (
        None
        if arguments.get("return_dict") in (None, True)
        else "it returns a tuple (return_dict=False), whose logits may be used"
    )


def _has_fsdp1(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what isn't imported wraps nothing
    return fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())


def _device_of(model: Any) -> torch.device:
    """Where token ids belong: beside the embedding, or what else there is."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight: Tensor = next((embeddings or model).parameters())
    return weight.device


def _goes_around(model: nn.Module) -> str:
    return (
        f"it needs a model that calls its head and then its loss_function, but {type(model).__name__} doesn't"
    )


def _find_transform(probed: Tensor, model: str) -> LogitTransform:
    """The scale and softcap that turn the probes, zero first, into what the model made of them."""
    if isinstance(probed, FakeTensor):
        return LogitTransform()
    probes = torch.tensor(_PROBES, dtype=torch.float64)
    found = probed.detach().flatten(0, -2)[0].double().cpu()
    scale = float(found[1] / probes[1])
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    transform = LogitTransform(scale)
    if abs(float(found[-1])) < 1e20:
        transform = LogitTransform(scale, softcap=float(found[-1]))
    if not torch.allclose(transform(probes), found, rtol=1e-5, atol=0):
        raise ConfigError(
            _REFUSED.format(f"it knows models that scale or softcap logits, but {model} does something else")
        )
    return transform
