"""The branches that only a CUDA device takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from layersample import ChunkedLoss, LayerScheduler, SelectiveRecompute
from layersample.metrics.spectrum import spectrum
from layersample.optim.masters import combine, split
from layersample.unwrapping import FROZEN
from tests.helpers import Given, make_batch, make_llama, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch() -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in make_batch().items()}


def train(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    """Weights after some steps of layers 1, 2, 1, ..."""
    adamw = {"fused": options.pop("fused", False), "capturable": options.pop("capturable", False)}
    compiled = options.pop("compiled", False)
    model = make_llama(dtype=dtype).cuda().train()  # type: ignore[call-arg]
    for layer in model.model.layers if compiled else ():
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adamw)
    with LayerScheduler(model, optimizer, Given((1,), (2,)), num_active=1, period=2, **options) as scheduler:
        for _ in range(steps):
            model(**batch(), use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return weights_of(model)


def test_offloaded_state_is_pinned_and_comes_back_to_the_bit() -> None:
    model = make_llama().cuda()  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weight = model.model.layers[1].mlp.up_proj.weight
    with LayerScheduler(
        model, optimizer, Given((1,), (2,)), num_active=1, period=1, state="offload"
    ) as scheduler:
        model(**batch(), use_cache=False).loss.backward()
        optimizer.step()
        before = optimizer.state[weight]["exp_avg"].clone()
        scheduler.step()
        away = optimizer.state[weight]["exp_avg"]
        assert away.device.type == "cpu" and away.is_pinned()
        assert torch.equal(away, before.cpu())
        optimizer.zero_grad()
        scheduler.step()
        assert torch.equal(optimizer.state[weight]["exp_avg"], before)


def test_offloaded_training_is_that_of_kept_state() -> None:
    kept, offloaded = train(8, state="keep"), train(8, state="offload")
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_offloaded_masters_train_as_kept_ones() -> None:
    """Remainders of bf16 weights are pinned copies too."""
    kept, offloaded = (train(8, torch.bfloat16, state=state) for state in ("keep", "offload"))
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_a_step_in_backward_is_that_of_the_loop() -> None:
    plain, stepped = train(6, fused=True), train(6, fused=True, step_in_backward=True)
    for name, weight in plain.items():
        torch.testing.assert_close(stepped[name], weight, rtol=1e-5, atol=1e-6)


def test_compiled_layers_train_as_plain_ones() -> None:
    """Layers 1 and 2 in turns: compiled code must notice that what requires a gradient has changed."""
    plain, compiled = train(8), train(8, compiled=True)
    torch.compiler.reset()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_frozen_weights_are_on_the_device_and_their_exact_values_pinned(form: str) -> None:
    if form == "nf4":
        pytest.importorskip("bitsandbytes")
    model = make_llama().cuda().train()  # type: ignore[call-arg]
    before = weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    given = {"num_active": 1, "period": 1, "frozen_weights": form}
    with LayerScheduler(model, optimizer, Given((1,), (2,)), **given) as scheduler:  # type: ignore[arg-type]
        frozen = model.model.layers[3].mlp.up_proj.weight
        held = getattr(frozen, FROZEN)
        assert held.tensors and all(tensor.is_cuda for tensor in held.tensors)
        assert held.exact().is_pinned()
        for _ in range(4):
            model(**batch(), use_cache=False).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        exact = model.state_dict()
        name = "model.layers.3.mlp.up_proj.weight"
        assert torch.equal(exact[name].cpu(), before[name].cpu())
        assert not torch.equal(
            exact["model.layers.1.mlp.up_proj.weight"].cpu(),
            before["model.layers.1.mlp.up_proj.weight"].cpu(),
        )
    assert all(p.is_cuda for p in model.parameters())


def test_masters_split_on_the_device_as_on_the_cpu() -> None:
    values = torch.randn(4096) * 0.02
    weight = values.cuda().bfloat16()
    parts = split(values.cuda(), weight)
    expected = split(values, values.bfloat16())
    assert all(torch.equal(parts[key].cpu(), expected[key]) for key in expected)
    assert torch.equal(combine(weight, parts).cpu(), values)


def test_spectra_on_the_device_are_those_of_the_cpu() -> None:
    matrix = torch.randn(96, 64)
    torch.testing.assert_close(spectrum(matrix.cuda()).cpu(), spectrum(matrix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fused", "capturable"])
@pytest.mark.parametrize("projection", [None, "galore"])
def test_kinds_of_optimizers_agree(kind: str, projection: str | None) -> None:
    options: dict[str, Any] = (
        {"projection": projection, "projection_options": {"rank": 4}} if projection else {}
    )
    plain, other = train(4, **options), train(4, **{kind: True, **options})
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)


def test_a_step_that_overflows_is_skipped_by_a_grad_scaler() -> None:
    model = make_llama().cuda().train()  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1e30)
    with LayerScheduler(model, optimizer, Given((1,)), num_active=1, period=9):
        before = weights_of(model)
        with torch.autocast("cuda", torch.float16):
            loss = model(**batch(), use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())
        assert scaler.get_scale() < 1e30


def test_savers_give_the_same_gradients_under_flash_attention() -> None:
    gradients = []
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this build or card has no flash attention")
    for saving in (False, True):
        model = make_llama(dtype=torch.bfloat16).cuda().train()  # type: ignore[call-arg]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if saving:
                with ChunkedLoss(model), SelectiveRecompute(model):
                    model(**batch(), use_cache=False).loss.backward()
            else:
                model(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=0.05, atol=1e-3)
