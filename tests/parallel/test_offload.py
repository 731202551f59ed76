"""FSDP2 on one device streams exact weights from the host's memory; with layer sampling, frozen ones are only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from layersample import ConfigError, LayerScheduler
from tests.documents import blocks
from tests.helpers import Given, make_batch, make_llama

SETS = ((0,), (2,), (1,))


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def streamed(**policies: Any) -> Any:
    model = make_llama(3)
    for part in (*model.model.layers, model):
        fully_shard(part, offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()), **policies)
    return model


def trained(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with LayerScheduler(
        model, optimizer, Given(*SETS), num_active=1, period=2, embeddings="freeze", check=True, **options
    ) as scheduler:
        for number in range(6):
            model(**make_batch(number)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def test_a_streamed_run_is_that_of_a_whole_model() -> None:
    expected, model = trained(make_llama(3)), streamed()
    found = trained(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_bf16_is_streamed_and_fp32_stays_on_the_host() -> None:
    model = streamed(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found, start = trained(model), make_llama(3)
    assert set(seen) == {torch.bfloat16} and all(value.dtype == torch.float32 for value in found.values())
    for name, value in start.named_parameters():
        assert torch.equal(found[name], value.detach()) == (name == "model.embed_tokens.weight")


def test_the_recipe_of_the_documentation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = [block.code for block in blocks("python") if "CPUOffloadPolicy" in block.code]
    make_llama(3).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)  # there is one
    names: dict[str, Any] = {}
    exec(compile(recipe, "docs/frozen.md", "exec"), names)
    model, scheduler = names["model"], names["scheduler"]
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    model(**make_batch()).loss.backward()
    names["optimizer"].step()
    scheduler.step()
    active = {f"model.layers.{index}." for index in scheduler.active}
    for name, parameter in model.named_parameters():
        trained = name == "model.norm.weight" or any(name.startswith(layer) for layer in active)
        assert torch.equal(parameter.full_tensor(), before[name]) != trained
    scheduler.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frozen_weights": "int8"}, r"give fully_shard an offload_policy=CPUOffloadPolicy\(\)"),
        ({"step_in_backward": True}, "the model is sharded, and its shards get theirs later"),
    ],
)
def test_what_needs_whole_weights_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trained(streamed(), **options)
