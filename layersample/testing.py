"""The tests that every sampler passes, ours and yours: subclass SamplerContract in your own test file."""

from __future__ import annotations

import inspect
import json

import torch
from torch import nn

from layersample.registry import describe, describe_options
from layersample.sampler import LayerSampler, LayerStatistics, SamplingContext
from layersample.scheduler import LayerScheduler


class SamplerContract:
    """Checks one sampler. Pytest runs its tests in each subclass.

    Example:
        >>> class TestMySampler(SamplerContract):
        ...     def make(self):
        ...         return MySampler(order="random")
    """

    num_layers = 7
    rounds = 60

    def make(self) -> LayerSampler:
        """Return a new sampler; it is called once or more a test."""
        raise NotImplementedError

    def draw(self, sampler: LayerSampler, *, rounds: int | None = None, seed: int = 0) -> list[list[int]]:
        """The layers of each period from 0 on, as a scheduler would ask for them."""
        return [
            sorted(sampler.sample(self.context(round=i, seed=seed))) for i in range(rounds or self.rounds)
        ]

    def context(self, *, round: int = 0, seed: int = 0, num_active: int = 2) -> SamplingContext:
        """A context of :attr:`num_layers` layers."""
        return SamplingContext(
            layers=tuple(f"layers.{i}" for i in range(self.num_layers)),
            num_active=num_active,
            round=round,
            step=round * 5,
            seed=seed,
            statistics=LayerStatistics((round,) * self.num_layers, (None,) * self.num_layers),
        )

    def test_draws_distinct_layers_that_exist(self) -> None:
        """Each draw holds indices of layers, none twice, and at least one."""
        for chosen in self.draw(self.make()):
            assert chosen, "a period without any layer, where nothing else trains"
            assert len(set(chosen)) == len(chosen)
            assert all(type(i) is int and 0 <= i < self.num_layers for i in chosen)

    def test_draws_num_active_layers_if_it_says_so(self) -> None:
        """A sampler with ``fixed_size`` draws exactly ``num_active``, for every possible number."""
        sampler = self.make()
        if sampler.fixed_size:
            for num_active in range(1, self.num_layers + 1):
                assert len(list(sampler.sample(self.context(num_active=num_active)))) == num_active

    def test_same_seed_gives_same_draws(self) -> None:
        """Ranks that share a seed must agree, and a run must be repeatable."""
        assert self.draw(self.make()) == self.draw(self.make())

    def test_leaves_global_randomness_alone(self) -> None:
        """Draws neither depend on torch's global generator nor move it."""
        torch.manual_seed(1)
        first = self.draw(self.make())
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert self.draw(self.make()) == first
        assert torch.equal(torch.get_rng_state(), before)

    def test_resumes_from_its_state(self) -> None:
        """A new sampler with the state of an old one, by way of JSON, goes on as the old one would."""
        old, new = self.make(), self.make()
        whole = self.draw(old, rounds=10)
        interrupted = self.make()
        self.draw(interrupted, rounds=4)
        new.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
        rest = [sorted(new.sample(self.context(round=i))) for i in range(4, 10)]
        assert rest == whole[4:]

    def test_reaches_every_layer(self) -> None:
        """In the long run no layer is left out."""
        assert {i for chosen in self.draw(self.make()) for i in chosen} == set(range(self.num_layers))

    def test_is_documented(self) -> None:
        """The docstring has a first line, and says what each option means."""
        cls = type(self.make())
        assert describe(cls)[0]
        assert [option.name for option in describe_options(cls) if not option.description] == []
        for parameter in inspect.signature(cls).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} must be keyword-only"

    def test_trains_a_model(self) -> None:
        """With a real scheduler: what is drawn moves, all else stays, checked bit by bit."""
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(self.num_layers)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        layers = [str(i) for i in range(self.num_layers)]
        with LayerScheduler(
            model, optimizer, self.make(), num_active=2, period=2, layers=layers, check=True
        ) as scheduler:
            for _ in range(8):
                model(torch.randn(3, 4)).square().mean().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
