from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from layersample.activations.recompute import SelectiveRecompute
from layersample.versions import checkpoint_activations
from tests.helpers import causal_lm, make_batch, make_llama


def gradients(model: nn.Module, recompute: bool) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    if recompute:
        with SelectiveRecompute(model):
            model(**make_batch(), use_cache=False).loss.backward()
    else:
        model(**make_batch(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [(), (1,), (0, 3)])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_gradients_are_the_same_to_the_bit(kind: str, active: tuple[int, ...], dtype: torch.dtype) -> None:
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    model = causal_lm(kind, num_hidden_layers=4, **dropout).to(dtype)
    if active:
        model.requires_grad_(False)
        layers = model.transformer.h if kind == "gpt2" else model.model.layers
        for index in active:
            layers[index].requires_grad_(True)
    plain, again = gradients(model, False), gradients(model, True)
    assert plain.keys() == again.keys() and plain
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_an_output_that_a_hook_replaces_is_kept(prepend: bool, late: bool) -> None:
    """Another's hook on an activation, to scale or to cut it out: its module's forward doesn't give that again."""

    def train(*, recompute: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = make_llama(num_layers=2)
        model.model.layers[0].requires_grad_(False)

        def add_hooks() -> None:
            for layer in model.model.layers:
                layer.mlp.act_fn.register_forward_hook(
                    lambda module, args, output: output * 0.5, prepend=prepend
                )

        if not late:
            add_hooks()
        with SelectiveRecompute(model) if recompute else nullcontext():
            if late:
                add_hooks()
            model(**make_batch(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = train(recompute=False), train(recompute=True)
    assert plain and all(torch.equal(plain[name], again[name]) for name in plain)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages that the graph holds, apart from the weights."""
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    recompute = SelectiveRecompute(model)
    pack = recompute._pack

    def counted(tensor: torch.Tensor) -> Any:
        packed = pack(tensor)
        storage = (packed if isinstance(packed, torch.Tensor) else packed.source).untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return packed

    recompute._pack = counted  # type: ignore[method-assign]
    with recompute:
        loss = model(**make_batch(size=4), use_cache=False).logits.sum()
    loss.backward()
    return sum(size for pointer, size in held.items() if pointer not in weights)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.8 keeps more; the gradients are the same"
)
@pytest.mark.parametrize(("dtype", "item"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_frozen_layer_keeps_what_its_input_gradient_needs_and_no_more(
    dtype: torch.dtype, item: int
) -> None:
    sizes = []
    for depth in (3, 4):
        model = make_llama(depth, dtype=dtype).train()
        model.requires_grad_(False)
        model.model.layers[0].requires_grad_(True)
        sizes.append(saved_bytes(model))
    tokens = 4 * 12
    two_norms, query, key_value, attention, gate_up = 2 * 16, 16, 2 * 8, 16, 2 * 32
    kept = tokens * item * (two_norms + query + key_value + attention + gate_up)
    small = 4 * (
        2 * tokens + 2 * tokens
    )  # in float32: a number a norm and position, a number a head and position
    assert sizes[1] - sizes[0] == kept + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_of_the_user_get_what_is_kept(dtype: torch.dtype) -> None:
    def run(recompute: bool) -> tuple[int, int, dict[str, torch.Tensor]]:
        model, packed, unpacked = make_llama(2, dtype=dtype).train(), [], []

        def pack(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
            packed.append(tensor.nbytes)
            return len(packed), tensor.detach().clone()

        def unpack(held: tuple[int, torch.Tensor]) -> torch.Tensor:
            unpacked.append(held[0])
            return held[1]

        with SelectiveRecompute(model) if recompute else nullcontext(), saved_tensors_hooks(pack, unpack):
            model(**make_batch(), use_cache=False).loss.backward()
        assert unpacked
        return len(packed), sum(packed), {name: p.grad for name, p in model.named_parameters()}

    plain, ours = run(False), run(True)
    assert 0 < ours[0] <= plain[0] and 0 < ours[1] <= plain[1]
    assert all(torch.equal(plain[2][name], ours[2][name]) for name in plain[2])


def test_what_is_kept_goes_to_where_save_on_cpu_puts_it() -> None:
    model = make_llama(2).train()
    seen: list[torch.Size] = []

    class Noting(save_on_cpu):
        def __init__(self) -> None:
            super().__init__()
            pack = self.pack_hook

            def note(tensor: torch.Tensor) -> Any:
                seen.append(tensor.shape)
                return pack(tensor)

            self.pack_hook = note

    plain = gradients(model, False)
    with SelectiveRecompute(model), Noting():
        model(**make_batch(), use_cache=False).loss.backward()
    assert seen
    assert all(torch.equal(plain[name], p.grad) for name, p in model.named_parameters())


def test_gradient_checkpointing_is_left_alone() -> None:
    model = make_llama().train()
    plain = gradients(model, False)
    for reentrant in (False, True):
        checkpoint_activations(model, {"use_reentrant": reentrant})
        again = gradients(model, True)
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_what_is_changed_in_place_is_told_and_never_used() -> None:
    class Gate(nn.Module):
        def __init__(self, change: str) -> None:
            super().__init__()
            self.linear, self.act, self.change = nn.Linear(4, 4), nn.SiLU(), change

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.linear(x)
            out = self.act(gate)
            if self.change == "output":
                out.add_(1)
            product: torch.Tensor = out * self.linear(x)
            if self.change == "input":
                gate.mul_(2)
            return product

    x = torch.randn(3, 4)
    model = Gate("output")
    model(x).sum().backward()
    plain = model.linear.weight.grad
    model.zero_grad()
    with SelectiveRecompute(model):
        model(x).sum().backward()
    assert plain is not None and model.linear.weight.grad is not None
    assert torch.equal(plain, model.linear.weight.grad)
    model = Gate("input")
    with (
        SelectiveRecompute(model),
        pytest.raises(RuntimeError, match="changed in place|modified by an inplace"),
    ):
        model(x).sum().backward()


def test_hooks_are_gone_after_a_failed_forward_and_after_close() -> None:
    model = make_llama().train()
    seen: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    with SelectiveRecompute(model):
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model()
        with saved_tensors_hooks(note, lambda t: t):
            torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    assert seen
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
