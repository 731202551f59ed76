"""What arithmetic says a step of layer sampling needs at least, in operations and in bytes."""

from __future__ import annotations

from collections.abc import Collection

from transformers import LlamaConfig


def flop_floor(
    config: LlamaConfig, batch: int, length: int, active: Collection[int], *, embedding: bool
) -> float:
    """FLOPs that a step needs at least, over those of full fine-tuning.

    Forward; the gradient of the input down to the lowest layer that trains; the gradients of the weights that
    train. A trained embedding takes backward to the bottom, and a tied head's weight gradient with it.

    Args:
        config: Configuration of a Llama with a tied head.
        batch: Examples of a step.
        length: Tokens of each, all with a label.
        active: Indices of the layers that train.
        embedding: Whether the embedding trains.
    """
    tokens, depth = batch * length, config.num_hidden_layers
    layer = 2 * tokens * _layer_weights(config)
    attention = 4 * tokens * length * config.hidden_size
    head = 2 * tokens * config.vocab_size * config.hidden_size
    forward = depth * (layer + attention) + head
    lowest = 0 if embedding else min(active)
    backward = head + (depth - lowest) * (layer + 2 * attention)
    weights = len(active) * layer + (head if embedding else 0)
    full = forward + head + depth * (layer + 2 * attention) + depth * layer + head
    return (forward + backward + weights) / full


def memory_floor(
    config: LlamaConfig, batch: int, length: int, active: Collection[int], *, itemsize: int
) -> int:
    """Bytes that a step needs at least, with a frozen embedding and AdamW.

    The weights; two moments of the layers that train, and under 16 bits their fp32 masters; one matrix's
    gradient, the largest; and what backward needs of each layer from the lowest that trains: the inputs of both
    norms, the queries, keys, values and output of attention, and the two halves of SwiGLU. A layer that trains
    needs the inputs of its matrices as well. Logits, one chunk at a time, are nothing beside it.

    Args:
        config: Configuration of a Llama with a tied head.
        batch: Examples of a step.
        length: Tokens of each.
        active: Indices of the layers that train.
        itemsize: Bytes of a weight and an activation: 4, or 2 with masters.
    """
    hidden, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    trained = len(active) * (_layer_weights(config) + 2 * hidden)
    weights = depth * (_layer_weights(config) + 2 * hidden) + hidden + config.vocab_size * hidden
    state = trained * (2 * 4 + (4 if itemsize < 4 else 0))
    each = 4 * hidden + 2 * _keys(config) + 2 * inner
    activations = (depth - min(active)) * each + len(active) * (2 * hidden + inner)  # a token's
    return itemsize * (weights + hidden * inner + batch * length * activations) + state


def _keys(config: LlamaConfig) -> int:
    """Numbers of a token's keys, or values."""
    return config.hidden_size // config.num_attention_heads * (config.num_key_value_heads or 0)


def _layer_weights(config: LlamaConfig) -> int:
    """Parameters of a layer's matrices."""
    hidden = config.hidden_size
    return 2 * hidden * (hidden + _keys(config)) + 3 * hidden * config.intermediate_size
