"""The tests that every sampler and every projection passes, ours and yours: subclass the contract in a test file.

:class:`SamplerContract` is for samplers, :class:`ProjectionContract` for low-rank projections.
"""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.layers.find import find_layers
from layersample.projection.projection import Projection, ProjectionContext, Side
from layersample.registry import describe, describe_options
from layersample.sampling.sampler import LayerSampler, Measurement, SamplingContext, check_collects
from layersample.sampling.statistics import GradientStatistics, LayerStatistics, LossStatistics
from layersample.scheduling.scheduler import LayerScheduler


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

    def model(self) -> nn.Module:
        """A model of :attr:`num_layers` layers; override it where the sampler measures what this one hasn't."""
        return _Layers(self.num_layers)

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
        """What training tells: gradients that grow with depth and shrink with time, and a loss that falls.

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
        cls = type(self.make())
        assert describe(cls)[0]
        assert [option.name for option in describe_options(cls) if not option.description] == []
        for parameter in inspect.signature(cls).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} must be keyword-only"

    def test_trains_a_model(self) -> None:
        """With a real scheduler: what is drawn moves, all else stays, checked bit by bit."""
        model = self.model()
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with LayerScheduler(
            model, optimizer, self.make(), num_active=2, period=2, batches=self.batches, check=True
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


class ProjectionContract:
    """Checks one projection. Pytest runs its tests in each subclass.

    Example:
        >>> class TestMyProjection(ProjectionContract):
        ...     def make(self):
        ...         return MyProjection(rank=4)
    """

    steps = 6

    def make(self) -> Projection:
        """Return a new projection of a rank below 8; it is called once or more a test."""
        raise NotImplementedError

    def gradient(self, *shape: int, seed: int = 0) -> Tensor:
        """A gradient of a shape, of which a few directions stand out."""
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(*shape[:-1], 2, generator=generator) @ torch.randn(
            2, shape[-1], generator=generator
        )
        return few + 0.1 * torch.randn(*shape, generator=generator)

    def context(self, *, name: str = "layers.0.weight", steps: int = 0, seed: int = 0) -> ProjectionContext:
        """What a projection may know."""
        return ProjectionContext(name, steps, seed)

    def test_a_basis_has_rank_columns(self) -> None:
        """A matrix ``(k, n)`` and a batch of them get bases ``(k, rank)``: finite, of full rank, in 32 bits."""
        made = self.make()
        assert 1 <= made.rank < 8, "the contract's matrices are at least 8 wide"
        for shape in ((8, 20), (20, 8), (16, 16), (3, 8, 20)):
            gradient, previous = self.gradient(*shape), None
            for step in range(3):
                basis = made.basis(gradient, previous, self.context(steps=step))
                assert basis.shape == (*shape[:-1], made.rank)
                assert basis.dtype in (torch.float32, torch.float64)
                assert bool(torch.isfinite(basis).all())
                assert bool((torch.linalg.matrix_rank(basis.double()) == made.rank).all())
                gradient, previous = self.gradient(*shape, seed=step + 1), basis

    def test_leaves_its_gradient_as_it_is(self) -> None:
        """The optimizer and other parameters see it after the basis was chosen."""
        gradient = self.gradient(8, 20)
        before = gradient.clone()
        self.make().basis(gradient, None, self.context())
        assert torch.equal(gradient, before)

    def test_same_context_gives_the_same_basis(self) -> None:
        """It neither depends on torch's global generator nor moves it, so ranks agree and a run is repeatable."""
        gradient = self.gradient(8, 20)
        torch.manual_seed(1)
        first = self.make().basis(gradient, None, self.context())
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(self.make().basis(gradient, None, self.context()), first)
        assert torch.equal(torch.get_rng_state(), before)

    def test_takes_16_bits_if_it_says_so(self) -> None:
        """A projection with ``takes_16_bits`` gets bf16 gradients as they are."""
        made = self.make()
        if made.takes_16_bits:
            gradient = self.gradient(8, 20).bfloat16()
            basis = made.basis(gradient, None, self.context())
            assert basis.dtype in (torch.float32, torch.float64) and bool(torch.isfinite(basis).all())

    def test_trains_either_side_with_a_small_state(self) -> None:
        """On each side, in 32 and 16 bits: weights move, stay finite, and the state is ``rank`` wide."""
        for side in get_args(Side):
            for dtype in (torch.float32, torch.bfloat16):
                made = self.make()
                made.side = side
                model, optimizer, scheduler = self._start(made, dtype)
                before = [parameter.detach().clone() for parameter in model.parameters()]
                self._train(model, optimizer, scheduler, range(self.steps))
                for parameter, old in zip(model.parameters(), before, strict=True):
                    assert bool(torch.isfinite(parameter).all()) and not torch.equal(parameter, old)
                    kept = 0 if made.is_left(parameter.shape) else 1
                    assert (
                        optimizer.state[parameter]["exp_avg"].numel() == made.rank * parameter.shape[1 - kept]
                    )
                scheduler.close()

    def test_resumes_to_the_bit(self) -> None:
        """A run from a checkpoint ends where the run that was not interrupted ends."""
        whole = self._start(self.make())
        self._train(*whole, range(self.steps))
        first = self._start(self.make())
        half = self.steps // 2
        self._train(*first, range(half))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = self._start(self.make())
        weights, state, schedule = torch.load(file, weights_only=True)
        second[0].load_state_dict(weights)
        second[1].load_state_dict(state)
        second[2].load_state_dict(schedule)
        self._train(*second, range(half, self.steps))
        for one, other in zip(second[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(one, other)

    def test_is_documented(self) -> None:
        """The docstring has a first line, and says what each option means; options are keyword-only."""
        cls = type(self.make())
        assert describe(cls)[0]
        assert [option.name for option in describe_options(cls) if not option.description] == []
        for parameter in inspect.signature(cls).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, f"option {parameter.name} must be keyword-only"

    def _start(
        self, projection: Projection, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, Optimizer, LayerScheduler]:
        torch.manual_seed(0)
        model = _Layers(2, widths=(8, 20, 8), bias=False).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, LayerScheduler(model, optimizer, _Both(), period=4, projection=projection)

    def _train(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LayerScheduler, steps: Iterable[int]
    ) -> None:
        for step in steps:
            inputs = self.gradient(16, 8, seed=step).to(next(model.parameters()).dtype)
            model(inputs).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


class _Both(LayerSampler):
    """Every layer, always."""

    def sample(self, context: SamplingContext) -> range:
        return range(context.num_layers)


class _Layers(nn.Module):
    """A chain of linear layers with a loss."""

    def __init__(self, num_layers: int, *, widths: Sequence[int] = (4,), bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=num_layers)
        widths = widths if len(widths) > 1 else [*widths] * (num_layers + 1)
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=bias) for before, after in zip(widths, widths[1:], strict=False)
        )

    def forward(self, inputs: torch.Tensor) -> SimpleNamespace:
        for layer in self.layers:
            inputs = layer(inputs)
        return SimpleNamespace(loss=inputs.square().mean())
