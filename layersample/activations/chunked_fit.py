"""Whether a chunked loss can take the place of a model's own, as the model shows without being run."""

from __future__ import annotations

from typing import Any

from torch import nn

from layersample.unwrapping import unwrap
from layersample.versions import installed


def inner_model(model: nn.Module) -> Any:
    """The causal language model inside of the wrappers of torch and PEFT."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def why_not_by_look(model: Any) -> str | None:
    """Why a model can't have a chunked loss, or ``None`` where nothing speaks against it.

    Args:
        model: The model inside of its wrappers.
    """
    name = type(model).__name__
    reason = why_not_its_head(model)
    if reason is not None:
        return reason
    # A property over _loss_function, in place of which ours is put and taken away again.
    if not isinstance(getattr(type(model), "loss_function", None), property):
        return f"{name} has no property loss_function, as models of transformers 5 have ({installed('transformers')})"
    return _why_not_its_loss(model)


def head_of(model: Any) -> Any:
    """The module that makes a model's logits, or ``None``."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def why_not_its_head(model: Any) -> str | None:
    """Why the head that a model has now can't be given its chunks, or ``None``."""
    name, head = type(model).__name__, head_of(model)
    if head is None:
        return f"it needs a language model with a linear head, but {name} has none"
    # Subclasses that keep nn.Linear's forward are linear (FSDP2's, parametrized ones); a quantized head, or one of
    # PEFT's with LoRA on it, isn't.
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return (
            f"it needs a language model with a linear head, but the head of {name} is a "
            f"{type(head).__module__}.{type(head).__qualname__}"
        )
    if "forward" in vars(head):
        return f"the forward of {name}'s head has been replaced already, by another chunked loss or a library"
    return None


def _why_not_its_loss(model: Any) -> str | None:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"it is that of the next token, but {name} is an encoder-decoder"
    loss_type = str(getattr(model, "loss_type", None))
    own = vars(model).get("_loss_function")
    # transformers takes the next token's loss where the class name says nothing (GPT2LMHeadModel).
    found = own if own is not None else LOSS_MAPPING.get(loss_type, LOSS_MAPPING["ForCausalLM"])
    if found in (ForCausalLMLoss, LOSS_MAPPING["ForCausalLM"]):
        return None
    if own is not None:
        return f"{name} has a loss_function of its own, {getattr(own, '__qualname__', repr(own))}"
    return f"it is that of the next token, but {name} is trained on {getattr(found, '__name__', found)}"
