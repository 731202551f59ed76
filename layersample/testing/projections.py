"""What every projection does."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layersample.projection.projection import Projection, ProjectionContext, Side
from layersample.sampling.sampler import LayerSampler, SamplingContext
from layersample.scheduling.scheduler import LayerScheduler
from layersample.testing.documented import check_documented
from layersample.testing.models import Chain


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
        check_documented(self.make())

    def _start(
        self, projection: Projection, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, Optimizer, LayerScheduler]:
        torch.manual_seed(0)
        model = Chain(2, widths=(8, 20, 8), bias=False).to(dtype)
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
