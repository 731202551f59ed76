"""What every sampler does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from layersample.layers.find import find_layers
from layersample.sampling.sampler import LayerSampler, Measurement, SamplingContext, check_collects
from layersample.sampling.statistics import GradientStatistics, LayerStatistics, LossStatistics
from layersample.scheduling.scheduler import LayerScheduler
from layersample.testing.documented import check_documented
from layersample.testing.models import Chain


class SamplerContract:
    """Checks one sampler. Pytest runs its tests in each subclass.

    Example:
        >>> class TestMySampler(SamplerContract):
        ...     def make(self):
        ...         return MySampler(order="random")
    """

    num_layers = 7
    rounds = 60
    scheduler_options: Mapping[str, Any] = {}
    """What a scheduler must be given for it, such as a projection."""

    def make(self) -> LayerSampler:
        """Return a new sampler; it is called once or more a test."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """A model of :attr:`num_layers` layers; override it where the sampler measures what this one hasn't."""
        return Chain(self.num_layers)

    def batches(self) -> Iterable[Mapping[str, Any]]:
        """Arguments of the model's forward, labels included."""
        generator = torch.Generator().manual_seed(0)
        return [{"inputs": torch.randn(3, 4, generator=generator)} for _ in range(2)]

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in find_layers(self.model()).layers)

    def measured(self) -> LayerSampler:
        """A new sampler that has measured the model, as a scheduler lets it."""
        sampler = self.make()
        model = self.model()
        sampler.measure(Measurement(model, find_layers(model), self._names, 2, self._names, self.batches))
        return sampler

    def draw(
        self,
        sampler: LayerSampler,
        *,
        rounds: int | None = None,
        seed: int = 0,
        before: Sequence[Sequence[int]] = (),
    ) -> list[list[int]]:
        """The layers of each period, as a scheduler would ask for them and tell of them.

        Args:
            sampler: The sampler.
            rounds: Number of the period to end before.
            seed: Seed of the draws.
            before: Those of the periods before, which aren't drawn again.
        """
        drawn = [list(chosen) for chosen in before]
        while len(drawn) < (rounds or self.rounds):
            context = self.context(round=len(drawn), seed=seed, before=drawn)
            chosen = sorted(sampler.sample(context))
            self.tell(sampler, context, chosen)
            drawn.append(chosen)
        return drawn[len(before) :]

    def tell(self, sampler: LayerSampler, context: SamplingContext, chosen: Sequence[int]) -> None:
        """Let a sampler observe the period that it has drawn."""
        sampler.observe(context.statistics, replace(context, active=tuple(chosen)))

    def context(
        self,
        *,
        round: int = 0,
        seed: int = 0,
        num_active: int = 2,
        before: Sequence[Sequence[int]] | None = None,
    ) -> SamplingContext:
        """A context of :attr:`num_layers` layers, with statistics that depend on the period and the draws alone.

        Args:
            round: Number of the period.
            seed: Seed of the draws.
            num_active: Layers to draw.
            before: The draws of the periods before; by default all layers trained in each.
        """
        return SamplingContext(
            layers=self._names,
            num_active=num_active,
            round=round,
            step=round * 5,
            seed=seed,
            statistics=self.statistics([range(self.num_layers)] * round if before is None else before),
        )

    def statistics(self, before: Sequence[Sequence[int]]) -> LayerStatistics:
        """What training tells: gradients that grow with depth and shrink with time, as changes do, and a falling loss.

        The lowest layer has no gradient in the first period, as where all of them were no numbers.

        Args:
            before: The layers of each period so far.
        """
        round = len(before)
        norms = tuple((1 + index) / (1 + 0.1 * round) for index in range(self.num_layers))
        known = (None, *norms[1:]) if round == 0 else norms
        loss = 4 / (1 + 0.1 * round)
        last = [
            [number for number, chosen in enumerate(before) if i in chosen] for i in range(self.num_layers)
        ]
        return LayerStatistics(
            tuple(len(periods) for periods in last),
            tuple(periods[-1] if periods else None for periods in last),
            round,
            GradientStatistics(known, known, (100,) * self.num_layers),
            LossStatistics(5, loss, 0.95 * loss, 0.95 * loss),
            tuple(None if norm is None else 0.01 * norm for norm in known),
        )

    def test_draws_distinct_layers_that_exist(self) -> None:
        """Each draw holds indices of layers, none twice, and at least one."""
        for chosen in self.draw(self.measured()):
            assert chosen, "a period without any layer, where nothing else trains"
            assert len(set(chosen)) == len(chosen)
            assert all(type(i) is int and 0 <= i < self.num_layers for i in chosen)

    def test_draws_num_active_layers_if_it_says_so(self) -> None:
        """A sampler with ``fixed_size`` draws exactly ``num_active``, for every possible number."""
        sampler = self.measured()
        if sampler.fixed_size:
            for num_active in range(1, self.num_layers + 1):
                assert len(list(sampler.sample(self.context(num_active=num_active)))) == num_active

    def test_same_seed_gives_same_draws(self) -> None:
        """Ranks that share a seed must agree, and a run must be repeatable."""
        assert self.draw(self.measured()) == self.draw(self.measured())

    def test_leaves_global_randomness_alone(self) -> None:
        """Draws neither depend on torch's global generator nor move it."""
        one, other = self.measured(), self.measured()
        torch.manual_seed(1)
        first = self.draw(one)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert self.draw(other) == first
        assert torch.equal(torch.get_rng_state(), before)

    def test_resumes_from_its_state(self) -> None:
        """A new sampler with the state of an old one, by way of JSON, goes on as the old one would."""
        old, new = self.measured(), self.make()
        whole = self.draw(old, rounds=10)
        interrupted = self.measured()
        self.draw(interrupted, rounds=4)
        new.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
        assert self.draw(new, rounds=10, before=whole[:4]) == whole[4:]
        assert json.dumps(new.state_dict()) == json.dumps(old.state_dict())

    def test_asks_for_what_it_looks_at(self) -> None:
        """What it doesn't say in ``collects`` isn't there; what it says exists."""
        sampler = self.measured()
        assert check_collects(sampler) == sampler.collects
        for round in range(3):
            context = self.context(round=round)
            asked = replace(
                context.statistics,
                gradients=context.statistics.gradients if "gradients" in sampler.collects else None,
                losses=context.statistics.losses if "loss" in sampler.collects else None,
                changes=context.statistics.changes if "weights" in sampler.collects else None,
            )
            context = replace(context, statistics=asked)
            context = replace(context, active=tuple(sorted(sampler.sample(context))))
            if sampler.watches_steps:
                assert isinstance(sampler.wants_new_period(asked, context), bool)
            sampler.observe(asked, context)

    def test_reaches_every_layer(self) -> None:
        """In the long run no layer is left out."""
        assert {i for chosen in self.draw(self.measured()) for i in chosen} == set(range(self.num_layers))

    def test_is_documented(self) -> None:
        """The docstring has a first line, and says what each option means."""
        check_documented(self.make())

    def test_trains_a_model(self) -> None:
        """With a real scheduler: what is drawn moves, all else stays, checked bit by bit."""
        model = self.model()
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with LayerScheduler(
            model,
            optimizer,
            self.make(),
            num_active=2,
            period=2,
            batches=self.batches,
            check=True,
            **self.scheduler_options,
        ) as scheduler:
            assert all(map(torch.equal, weights, model.parameters())), "measuring moved the weights"
            for _ in range(4):
                for batch in self.batches():
                    loss = model(**batch).loss
                    loss.backward()
                    optimizer.step()
                    scheduler.step(loss=loss)
                    optimizer.zero_grad()

    def test_inclusion_probabilities_fit_the_draws(self) -> None:
        """If the sampler knows them: one a layer, from 0 to 1; what can't be drawn never is."""
        sampler = self.measured()
        for round in range(5):
            context = self.context(round=round)
            inclusion = sampler.inclusion_probabilities(context)
            if inclusion is None:
                continue
            assert len(inclusion) == self.num_layers
            assert all(-1e-9 <= value <= 1 + 1e-9 for value in inclusion)
            chosen = set(sampler.sample(context))
            self.tell(sampler, context, sorted(chosen))
            assert all(inclusion[i] > 0 for i in chosen)
            if sampler.fixed_size:
                assert abs(sum(inclusion) - len(chosen)) < 1e-6
