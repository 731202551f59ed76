from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layersample import ConfigError, find_layers
from layersample.metrics import outlier_ratios

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]

THRESHOLDS = (1.5, 2, 3, 5)


def make_batches(count: int = 3, length: int = 11) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 60, (2, length), generator=generator)} for _ in range(count)]


def naive_ratio(model: nn.Module, layer: str, batches: list[Batch], threshold: float) -> float:
    """OWL's definition, with every activation kept."""
    linears = [m for m in model.get_submodule(layer).modules() if isinstance(m, (nn.Linear, Conv1D))]
    kept: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: kept[m].append(args[0].flatten(0, -2))) for m in linears
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    weights = {m: m.weight.T if isinstance(m, Conv1D) else m.weight for m in linears}  # (out, in)
    scores = [weights[m].abs() * torch.cat(kept[m]).norm(dim=0) for m in linears]
    flat = torch.cat([score.flatten() for score in scores])
    return 100.0 * int((flat > threshold * flat.mean()).sum()) / flat.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_equals_the_naive_ratio_exactly(make_model: Make, family: str) -> None:
    model = make_model(family)
    batches = make_batches()
    found = outlier_ratios(model, batches, thresholds=THRESHOLDS)
    assert list(found) == [layer.name for layer in find_layers(model).layers]
    for layer, ratios in found.items():
        assert ratios == {m: naive_ratio(model, layer, batches, m) for m in THRESHOLDS}
        assert ratios[1.5] > ratios[3] > 0.0


def naive_expert_scores(experts: Any, routed: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Scores of Mixtral's experts, one token and one expert at a time."""
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    sums = torch.zeros(len(gate_up), gate_up.shape[2]), torch.zeros(len(down), down.shape[2])
    for hidden, chosen in routed:
        for token, indices in zip(hidden, chosen, strict=True):
            for expert in indices.tolist():
                gate, up = (gate_up[expert] @ token).chunk(2)
                sums[0][expert] += token.square()
                sums[1][expert] += (nn.functional.silu(gate) * up).square()
    return [gate_up.abs() * sums[0].sqrt()[:, None], down.abs() * sums[1].sqrt()[:, None]]


def test_fused_experts_are_seen(make_model: Make) -> None:
    model = make_model("mixtral")
    batches = make_batches()
    before = model.config._experts_implementation
    found = outlier_ratios(model, batches, thresholds=THRESHOLDS)
    assert model.config._experts_implementation == before
    block = model.model.layers[1]
    routed: list[tuple[Tensor, Tensor]] = []
    router: list[Tensor] = []
    hooks = [
        block.mlp.experts.register_forward_pre_hook(lambda _, args: routed.append((args[0], args[1]))),
        block.mlp.gate.register_forward_pre_hook(lambda _, args: router.append(args[0].flatten(0, -2))),
    ]
    attention: dict[nn.Linear, list[Tensor]] = {
        m: [] for m in block.self_attn.modules() if isinstance(m, nn.Linear)
    }
    hooks += [
        m.register_forward_pre_hook(lambda m, a: attention[m].append(a[0].flatten(0, -2))) for m in attention
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    scores = [m.weight.detach().abs() * torch.cat(x).norm(dim=0) for m, x in attention.items()]
    scores += naive_expert_scores(block.mlp.experts, routed)
    scores.append(block.mlp.gate.weight.detach().abs() * torch.cat(router).norm(dim=0))
    flat = torch.cat([score.flatten() for score in scores])
    for m in THRESHOLDS:
        naive = 100.0 * int((flat > m * flat.mean()).sum()) / flat.numel()
        assert found["model.layers.1"][m] == pytest.approx(naive, abs=100.0 / flat.numel())


def test_transposed_experts_are_seen(make_model: Make) -> None:
    found = outlier_ratios(make_model("gpt_oss"), make_batches(), thresholds=THRESHOLDS)
    assert all(ratios[1.5] > 0 for ratios in found.values())


def test_batches_may_be_tensors_and_a_generator(make_model: Make) -> None:
    model = make_model()
    batches = make_batches()
    tensors: Iterator[Tensor] = (batch["input_ids"] for batch in batches)
    assert outlier_ratios(model, tensors) == outlier_ratios(model, batches)


def test_how_samples_are_batched_does_not_matter(make_model: Make) -> None:
    model = make_model()
    batches = make_batches()
    joined = {"input_ids": torch.cat([batch["input_ids"] for batch in batches])}
    apart, together = outlier_ratios(model, batches), outlier_ratios(model, [joined])
    for layer in apart:
        assert apart[layer] == pytest.approx(together[layer], abs=0.02)


def test_padding_does_not_count(make_model: Make) -> None:
    model = make_model()
    [batch] = make_batches(1)
    padded = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 9), value=7),
        "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 9)),
    }
    plain, found = outlier_ratios(model, [batch]), outlier_ratios(model, [padded])
    blind = outlier_ratios(model, [{"input_ids": padded["input_ids"]}])
    for layer in plain:
        assert found[layer] == pytest.approx(plain[layer], abs=0.02)
    assert any(abs(blind[layer][3.0] - plain[layer][3.0]) > 0.02 for layer in plain)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_a_peft_models_base_weights(make_model: Make) -> None:
    plain = outlier_ratios(make_model(), make_batches())
    wrapped = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    assert list(outlier_ratios(wrapped, make_batches()).values()) == list(plain.values())


def test_modes_hooks_and_gradients_are_as_before(make_model: Make) -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    outlier_ratios(model, make_batches(1))
    with pytest.raises(ValueError, match="input_ids"):
        outlier_ratios(model, [{"input_idz": torch.zeros(1, 2)}])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_no_activation_is_held(make_model: Make) -> None:
    import gc
    import weakref

    model = make_model()
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    down = model.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))

    def batches() -> Iterator[Batch]:
        for batch in make_batches(3):
            gc.collect()
            alive.append(sum(reference() is not None for reference in inputs))
            yield batch

    outlier_ratios(model, batches())
    hook.remove()
    assert len(inputs) == 3 and alive == [0, 0, 0]


@pytest.mark.parametrize(
    ("batches", "thresholds", "message"),
    [
        ([], (3,), "at least one calibration batch, but got none"),
        (["text"], (3,), "must be a mapping or a tensor, but got str"),
        (make_batches(1), (), r"one or more positive numbers, but got \(\)"),
        (make_batches(1), (3, 0), r"positive numbers, but got \(3, 0\)"),
        (make_batches(1), (float("nan"),), "positive numbers"),
    ],
)
def test_bad_input(make_model: Make, batches: Any, thresholds: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        outlier_ratios(make_model(), batches, thresholds=thresholds)


def test_weights_that_are_not_finite_or_all_zero(make_model: Make) -> None:
    for value, layer in ((float("nan"), 0), (0.0, 1)):
        model = make_model()
        with torch.no_grad():
            for parameter in model.model.layers[layer].parameters():
                if parameter.dim() == 2:
                    parameter.fill_(value)
        with pytest.raises(ConfigError, match=rf"model\.layers\.{layer} must be finite and not all zero"):
            outlier_ratios(model, make_batches(1))


def test_a_layer_that_takes_no_part() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks[0](x)
            return out

    model = Skipping()
    layers = find_layers(model, layers="blocks")
    with pytest.raises(ConfigError, match=r"no weight of blocks\.1 saw any input"):
        outlier_ratios(model, [torch.randn(3, 4)], layers)
    first = replace(layers, layers=layers.layers[:1])
    assert outlier_ratios(model, [torch.randn(3, 4)], first).keys() == {"blocks.0"}
