"""Every sampler that comes with layersample, through its contract; and what is particular to each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from layersample import LayerSampler, SamplingContext, create_sampler, list_samplers
from layersample.sampling.statistics import LayerStatistics
from layersample.testing import SamplerContract
from tests.helpers import make_batch, make_llama

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("lisa", {}),
    ("lisa", {"draw": "bernoulli"}),
    ("prior", {"weights": "increase"}),
    ("prior", {"weights": "middle", "draw": "systematic"}),
    ("lora_norm", {"probe_steps": 2, "probe_rank": 2}),
    ("lora_norm", {"measure": "merged", "probe_steps": 1}),
    ("owlore", {"metric": "alpha"}),
    ("owlore", {"metric": "hill", "baseline": "random"}),
    ("owlore", {"metric": "outlier", "threshold": 3.0}),
    ("grass", {}),
    ("bandit", {}),
    ("misa", {"eta": 0.1}),
    ("adagradselect", {}),
    ("blockllm", {"patience": 2}),
    ("spectrum", {}),
    ("ist", {}),
    ("gum", {}),
    ("warmup", {"sampler": "grass", "first": 5}),
    ("mixture", {"samplers": ["spectrum", "bandit"], "shares": [1, 3]}),
    ("max_wait", {"sampler": "blockllm", "periods": 6}),
    ("freeze_converged", {"sampler": "misa", "grace": 2}),
    *(("cyclic", {"order": order}) for order in ("ascending", "descending", "mirror", "reshuffled")),
]


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in VARIANTS]
)
class TestBuiltIn(SamplerContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name: str, options: dict[str, Any]) -> None:
        self._made = (name, options)
        if create_sampler(name, options).needs_projection:
            self.scheduler_options = {"projection": "galore", "projection_options": {"rank": 4}}

    def make(self) -> LayerSampler:
        return create_sampler(*self._made)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        return [make_batch(i) for i in range(2)]

    def model(self) -> nn.Module:
        return make_llama(self.num_layers)


def test_every_built_in_sampler_is_in_the_contract() -> None:
    built_in = {
        n for n, cls in list_samplers().items() if cls.__module__.startswith("layersample_strategies")
    }
    assert built_in == {name for name, _ in VARIANTS}
    assert all(cls.source for cls in list_samplers().values() if cls.__module__.startswith("layersample_"))


def draws(
    sampler: LayerSampler, rounds: int, layers: int = 5, active: int = 2, empty: bool = False
) -> list[Any]:
    names = tuple(map(str, range(layers)))
    return [
        sorted(sampler.sample(SamplingContext(names, active, round=i, seed=1, allow_empty=empty)))
        for i in range(rounds)
    ]


def test_lisa_is_uniform_over_pairs() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for pair in draws(create_sampler("lisa"), 4000):
        counts[tuple(pair)] = counts.get(tuple(pair), 0) + 1
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_lisa_bernoulli_draws_each_layer_on_its_own() -> None:
    sets = draws(create_sampler("lisa", {"draw": "bernoulli"}), 4000, empty=True)
    sizes = [sum(len(s) == k for s in sets) for k in range(6)]
    expected = [4000 * stats.binom.pmf(k, 5, 0.4) for k in range(6)]
    assert stats.chisquare(sizes, expected).pvalue > 1e-3
    assert [] in sets
    assert [] not in draws(create_sampler("lisa", {"draw": "bernoulli"}), 4000, empty=False)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]),
        ("descending", [[4], [2, 3], [0, 1], [4], [2, 3], [0, 1]]),
        ("mirror", [[0, 1], [2, 3], [4], [4], [2, 3], [0, 1]]),
    ],
)
def test_cyclic_orders(order: str, expected: list[list[int]]) -> None:
    assert draws(create_sampler("cyclic", {"order": order}), 6) == expected


def test_cyclic_reshuffled_trains_each_group_once_an_epoch_in_new_orders() -> None:
    sets = draws(create_sampler("cyclic", {"order": "reshuffled"}), 30)
    epochs = [sets[i : i + 3] for i in range(0, 30, 3)]
    assert all(sorted(epoch) == [[0, 1], [2, 3], [4]] for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 2


@pytest.mark.parametrize(("name", "options"), [("lisa", {"draw": "some"}), ("cyclic", {"order": "down"})])
def test_bad_options_given_in_code(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be .*, but got '(some|down)'"):
        list_samplers()[name](**options)


def test_statistics_are_part_of_the_context() -> None:
    context = SamplingContext(("a",), 1, statistics=LayerStatistics((3,), (2,)))
    assert context.statistics.visits == (3,)
