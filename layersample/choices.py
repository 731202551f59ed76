"""What options choose between. Nothing is imported here, so that the command line's help needs no torch."""

from __future__ import annotations

from typing import Literal

Rule = Literal["train", "freeze", "sample"]
"""What happens to what isn't a layer: it always trains, never trains, or is sampled as one more layer."""

Granularity = Literal["layer", "block", "module", "tensor"]
"""What is sampled of a layer: all of it, its attention and MLP, its modules, or its tensors."""

StatePolicyName = Literal["drop", "keep", "offload"]
"""What happens to the optimizer's state of a frozen layer."""

ClipBy = Literal["running", "parameter"]
"""What a step in the backward pass clips by: the norm of all gradients in the step before, or each one's own."""

Precision = Literal["fp32", "bf16", "bf16-mixed", "fp16-mixed"]
"""Type of weights and arithmetic; mixed: fp32 weights, and arithmetic in the other."""

Inactive = Literal["freeze", "sgd", "signsgd"]
"""What layers do that aren't active: nothing, or a step of plain or sign SGD in the backward pass."""

InactiveScope = Literal["all", "above"]
"""Which inactive layers do so: all, or those above the lowest active one."""
