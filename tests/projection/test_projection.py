"""Low-rank projection, against naive loops that do the same in a few lines."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layersample import (
    ConfigError,
    LayerScheduler,
    Projection,
    ProjectionContext,
    create_projection,
    list_projections,
    register_projection,
)
from layersample.choices import StatePolicyName
from layersample.projection.low_rank import BASIS, NonFiniteGradientError
from tests.helpers import make_batch, make_llama

RANK = 4


class Regression(nn.Module):
    """A linear layer in a list of layers, with data of its own: the gradient has its shape."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(columns, rows, bias=False, dtype=dtype)])
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, columns, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(64, rows, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.get_parameter("layers.0.weight")
        return weight

    def loss(self, step: int) -> Tensor:
        part = slice(8 * (step % 8), 8 * (step % 8) + 8)
        loss: Tensor = (self.layers[0](self.x[part]) - self.y[part]).square().mean()
        return loss


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> LayerScheduler:
    options.setdefault("projection", "galore")
    options.setdefault("projection_options", {"rank": RANK, "basis": "svd", "update_gap": 20})
    return LayerScheduler(model, optimizer, "full", num_active=1, layers="layers", **options)


def train(model: Regression, optimizer: torch.optim.Optimizer, steps: int, **options: Any) -> list[float]:
    scheduler = schedule(model, optimizer, **options)
    losses = []
    for step in range(steps):
        loss = model.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    scheduler.close()
    return losses


def naive_galore(model: Regression, steps: int, left: bool, lr: float, scale: float, decay: float) -> None:
    """GaLore as its paper says it, with AdamW."""
    weight: Any = model.weight
    m: Any = None
    v: Any = None
    basis: Any = None
    for step in range(steps):
        (gradient,) = torch.autograd.grad(model.loss(step), weight)
        if step % 20 == 0:
            u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
            basis = u[:, :RANK] if left else vt[:RANK].T
        low = basis.T @ gradient if left else gradient @ basis
        m = (0 if m is None else 0.9 * m) + 0.1 * low
        v = (0 if v is None else 0.999 * v) + 0.001 * low**2
        update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        with torch.no_grad():
            weight *= 1 - lr * decay
            weight -= lr * scale * (basis @ update if left else update @ basis.T)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "side", "left"),
    [
        ((24, 12), "std", False),
        ((12, 24), "std", True),
        ((24, 12), "reverse_std", True),
        ((12, 24), "reverse_std", False),
        ((24, 12), "left", True),
        ((12, 24), "right", False),
    ],
)
def test_galore_is_what_the_paper_says(
    shape: tuple[int, int], side: str, left: bool, decay: float, fused: bool
) -> None:
    ours, naive = Regression(*shape), Regression(*shape)
    naive.load_state_dict(ours.state_dict())
    options = {"rank": RANK, "basis": "svd", "update_gap": 20, "side": side, "scale": 0.5}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=decay, fused=fused)
    train(ours, optimizer, 50, projection_options=options)
    naive_galore(naive, 50, left, lr=1e-2, scale=0.5, decay=decay)
    torch.testing.assert_close(ours.weight, naive.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo-mini"])
def test_fira_and_apollo_are_what_their_papers_say(name: str) -> None:
    ours, naive = Regression(12, 24), Regression(12, 24)
    rank, scale = (1, 128.0) if name == "apollo-mini" else (RANK, 1.0)
    options: dict[str, Any] = {"rank": rank, "scale": scale, "update_gap": 100}
    options |= {"basis": "svd"} if name == "fira" else {"per_channel": name == "apollo"}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = schedule(ours, optimizer, projection=name.partition("-")[0], projection_options=options)
    m = v = norm = None
    for step in range(10):
        loss = ours.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        basis = optimizer.state[ours.weight][BASIS]
        (gradient,) = torch.autograd.grad(naive.loss(step), naive.weight)
        low = basis.T @ gradient
        m = (0 if m is None else 0.9 * m) + 0.1 * low
        v = (0 if v is None else 0.999 * v) + 0.001 * low**2
        adam = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        per_column = adam.norm(dim=0) / low.norm(dim=0) if name != "apollo-mini" else adam.norm() / low.norm()
        update = (gradient - basis @ low if name == "fira" else gradient) * per_column
        if norm is not None and update.norm() > 1.01 * norm:
            update *= 1.01 * norm / update.norm()
        norm = update.norm()
        with torch.no_grad():
            naive.weight.sub_(1e-3 * (basis @ adam + update if name == "fira" else scale**0.5 * update))
        torch.testing.assert_close(ours.weight, naive.weight, rtol=0, atol=1e-12)
    scheduler.close()


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-2, maximize=True, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_on_the_projected_gradient(name: str) -> None:
    """A step is the optimizer's own on a small parameter that is kept beside the model."""
    ours, naive = Regression(12, 24), Regression(12, 24)
    naive.load_state_dict(ours.state_dict())
    optimizer = OPTIMIZERS[name](ours.parameters())
    options = {"rank": RANK, "basis": "svd", "scale": 0.5}
    train(ours, optimizer, 10, projection_options=options)

    low = nn.Parameter(torch.zeros(RANK, 24, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([low])
    (group,) = optimizer.param_groups
    decay, group["weight_decay"] = group["weight_decay"], 0.0
    decoupled = name in ("adamw", "adamw-foreach", "adamw-fused")
    for step in range(10):
        (gradient,) = torch.autograd.grad(naive.loss(step), naive.weight)
        with torch.no_grad():
            if not decoupled:
                gradient += naive.weight * (-decay if group.get("maximize") else decay)
            if step == 0:
                basis = torch.linalg.svd(gradient, full_matrices=False).U[:, :RANK]
            start = float(naive.weight.square().mean().sqrt()) if name == "adafactor" else 0.0
            low.fill_(start)
            low.grad = basis.T @ gradient
            optimizer.step()
            if decoupled:
                naive.weight.mul_(1 - group["lr"] * decay)
            naive.weight.add_(basis @ (low - start), alpha=0.5)
    torch.testing.assert_close(ours.weight, naive.weight, rtol=0, atol=1e-12)


def rank_two_problem(model: Regression) -> None:
    """Two outputs learn, each from inputs of its own: the gradient has rank two, and its rows are orthogonal."""
    rows, columns = model.weight.shape
    half = columns // 2
    with torch.no_grad():
        model.x[0::2, half:] = 0
        model.x[1::2, :half] = 0
        target = torch.zeros_like(model.y)
        target[0::2, 3], target[1::2, 7] = model.x[0::2].sum(1), 0.5 * model.x[1::2].sum(1)
        model.y.copy_(target)
        model.weight.zero_()
    mask = torch.zeros_like(model.y)
    mask[0::2, 3], mask[1::2, 7] = 1, 1
    model.loss = lambda step: ((model.layers[0](model.x) - model.y) * mask).square().mean()  # type: ignore[method-assign]


@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_gradient_of_low_rank_trains_as_at_full_rank(basis: str) -> None:
    runs = []
    for projection in ("galore", None):
        model = Regression(12, 24)
        rank_two_problem(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
        options = {"rank": 2, "basis": basis, "scale": 1.0}
        runs.append(
            train(model, optimizer, 50, projection=projection, projection_options=projection and options)
        )
    assert runs[0][-1] < 0.5 * runs[0][0]
    torch.testing.assert_close(*(torch.tensor(losses) for losses in runs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rotate", [False, True])
def test_momentum_survives_a_turn_of_the_basis_where_it_is_rotated(rotate: bool) -> None:
    """SGD with momentum is the same in any basis of the same subspace, if the momentum turns with it."""

    @register_projection("turning")
    class Turning(Projection):
        def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
            left = torch.linalg.svd(gradient, full_matrices=False).U[:, : self.rank]
            turn = torch.randn(self.rank, self.rank, generator=context.generator(), dtype=left.dtype)
            turned: Tensor = left @ torch.linalg.qr(turn).Q
            return turned

    losses = []
    for projection in ("turning", None):
        model = Regression(12, 24)
        rank_two_problem(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        options = {"rank": 2, "rotate_moments": rotate} if projection else None
        losses.append(train(model, optimizer, 30, projection=projection, projection_options=options))
    first, second = (torch.tensor(run) for run in losses)
    same = torch.allclose(first, second, rtol=1e-5, atol=0)
    assert same == rotate


@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "adamw-fused", "sgd-momentum"])
def test_state_has_exactly_the_bytes_of_the_formula(name: str) -> None:
    model = Regression(12, 24)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = schedule(model, optimizer)
    model.loss(0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moments = 1 if name == "sgd-momentum" else 2
    state = optimizer.state[model.weight]
    tensors = {key: value for key, value in state.items() if value.dim() > 0}
    assert sum(value.numel() for value in tensors.values()) == moments * RANK * 24 + 12 * RANK
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == 8 * (
        moments * RANK * 24 + 12 * RANK
    )
    assert optimizer.param_groups[0]["params"] == [model.weight]
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 1
    scheduler.close()


def run_llama(
    steps: int,
    *,
    state: StatePolicyName = "drop",
    stop: int | None = None,
    folder: Path | None = None,
    sampler: str = "lisa",
    projection: str = "galore",
    accumulation: int = 1,
    **options: Any,
) -> dict[str, Tensor]:
    """Train a tiny Llama, two layers at a time; stop in between and go on in new objects, where asked."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, LayerScheduler]:
        model = make_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = LayerScheduler(
            model,
            optimizer,
            sampler,
            num_active=2,
            period=3,
            state=state,
            projection=projection,
            projection_options={"rank": RANK, "update_gap": 4, **options},
            check=True,
        )
        return model, optimizer, scheduler

    model, optimizer, scheduler = build()
    for step in range(steps):
        if step == stop:
            assert folder is not None
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "s": scheduler.state_dict(),
                },
                folder / "checkpoint.pt",
            )
            model, optimizer, scheduler = build()
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["s"])
        for part in range(accumulation):
            (model(**make_batch(step * accumulation + part)).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    scheduler.close()
    return model.state_dict()


@pytest.mark.parametrize("stop", [2, 3, 7])
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("projection", ["galore", "apollo", "fira"])
def test_resume_in_mid_gap_is_exact(
    projection: str, state: StatePolicyName, stop: int, tmp_path: Path
) -> None:
    whole = run_llama(10, state=state, projection=projection)
    resumed = run_llama(10, state=state, projection=projection, stop=stop, folder=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_layer_that_comes_back_gets_a_new_basis(rotate: bool) -> None:
    seen: list[tuple[str, int, bool]] = []

    @register_projection("noting")
    class Noting(Projection):
        def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
            seen.append((context.name, context.steps, previous is None))
            return torch.eye(gradient.shape[0], self.rank, dtype=gradient.dtype)

    for state in ("drop", "keep", "offload"):
        seen.clear()
        run_llama(15, state=state, sampler="cyclic", projection="noting", rotate_moments=rotate)
        counts = [steps for name, steps, _ in seen if name == "model.layers.0.mlp.up_proj.weight"]
        assert counts and set(counts) == {0, 1, 2} and counts.count(0) == counts.count(2)
        assert all(new == (steps == 0) for _, steps, new in seen)


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_frozen_layers_hold_no_basis(state: StatePolicyName) -> None:
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LayerScheduler(
        model, optimizer, "cyclic", num_active=1, period=1, state=state, projection="galore",
        projection_options={"rank": RANK},
    )  # fmt: skip
    for step in range(3):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            assert not [key for key in optimizer.state.get(parameter, {}) if key.startswith("projection")]
    scheduler.close()


def test_gradient_accumulation_projects_the_sum() -> None:
    whole, parts = Regression(12, 24), Regression(12, 24)
    for model, count in ((whole, 1), (parts, 4)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = schedule(model, optimizer)
        for step in range(6):
            rows = slice(8 * step, 8 * step + 8)
            for x, y in zip(model.x[rows].chunk(count), model.y[rows].chunk(count), strict=True):
                ((model.layers[0](x) - y).square().mean() / count).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        scheduler.close()
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-9)


def test_every_group_has_its_own_settings() -> None:
    """Two layers in two groups of one optimizer are two optimizers with a layer each."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Regression(12, 24), Regression(24, 12)])

    settings: list[dict[str, Any]] = [
        {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.9, 0.9), "eps": 1e-4, "weight_decay": 0.0},
    ]
    both, alone = Two(), Two()
    runs: list[tuple[nn.Module, Iterable[Any], torch.optim.Optimizer]]
    model: Any
    groups = [{"params": [m.weight], **own} for m, own in zip(both.layers, settings, strict=True)]
    runs = [(both, both.layers, torch.optim.AdamW(groups))]
    for model, own in zip(alone.layers, settings, strict=True):
        runs.append((model, [model], torch.optim.AdamW([model.weight], **own)))
    for root, models, optimizer in runs:
        scheduler = schedule(root, optimizer)
        for step in range(5):
            for model in models:
                model.loss(step).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]
        assert all(isinstance(value, Tensor) for values in state.values() for value in values.values())
        scheduler.close()
    for one, other in zip(both.layers, alone.layers, strict=True):
        assert isinstance(one, Regression) and isinstance(other, Regression)
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("projection", ["galore", "apollo", "fira"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(projection: str, fused: bool) -> None:
    """Scaled gradients give the same weights, and a step that overflows changes nothing."""
    weights = []
    for scaled in (False, True):
        model = Regression(12, 24, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scheduler = schedule(model, optimizer, projection=projection, projection_options={"rank": RANK})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(6):
            if scaled and step == 3:
                before, basis = (
                    model.weight.clone(),
                    optimizer.state[model.weight][BASIS].clone(),
                )
                scaler.scale(model.loss(step)).backward()  # type: ignore[no-untyped-call]
                assert model.weight.grad is not None
                model.weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert torch.equal(model.weight, before)
                assert torch.equal(optimizer.state[model.weight][BASIS], basis)
            scaler.scale(model.loss(step)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        weights.append(model.weight.detach())
        scheduler.close()
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_targets_choose_by_parts_of_names() -> None:
    model = make_llama()
    scheduler = LayerScheduler(
        model, torch.optim.AdamW(model.parameters()), "lisa", projection="galore", projection_options={"rank": RANK}
    )  # fmt: skip
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert scheduler.projected == {name for name in matrices if ".layers." in name}
    scheduler.close()
    scheduler = LayerScheduler(
        model, torch.optim.AdamW(model.parameters()), "lisa", projection="galore",
        projection_options={"rank": RANK, "targets": ["q_proj", "mlp", "embed_tokens"]},
    )  # fmt: skip
    kinds = {name.split(".")[-2] for name in scheduler.projected}
    assert kinds == {"q_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"}
    scheduler.close()
    with pytest.raises(ConfigError, match="'qproj' is part of none. There are: .*q_proj"):
        LayerScheduler(
            model, torch.optim.AdamW(model.parameters()), "lisa", projection="galore",
            projection_options={"targets": ["qproj"]},
        )  # fmt: skip


def test_a_rank_that_is_no_restriction_trains_at_full_rank(caplog: pytest.LogCaptureFixture) -> None:
    full, ranked = (Regression(12, 24) for _ in range(2))
    ranked.load_state_dict(full.state_dict())
    train(full, torch.optim.AdamW(full.parameters(), lr=1e-2), 5, projection=None, projection_options=None)
    with caplog.at_level(logging.WARNING):
        train(ranked, torch.optim.AdamW(ranked.parameters(), lr=1e-2), 5, projection_options={"rank": 12})
    assert torch.equal(full.weight, ranked.weight)
    assert sum("train at full rank" in record.message for record in caplog.records) == 1


def test_a_gradient_that_is_no_number_is_named_and_changes_nothing() -> None:
    model = Regression(12, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(model, optimizer)
    model.loss(0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    weight = model.weight.detach().clone()
    assert model.weight.grad is not None
    model.weight.grad[2, 3] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"layers\.0\.weight is NaN or infinite at its step 2"):
        optimizer.step()
    with pytest.raises(NonFiniteGradientError, match=r"Nothing has changed: skip this batch"):
        optimizer.step()
    assert torch.equal(model.weight, weight)
    after = optimizer.state[model.weight]
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert optimizer.param_groups[0]["params"] == [model.weight]
    scheduler.close()


def test_an_optimizer_that_raises_leaves_everything_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Regression(12, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(model, optimizer)
    model.loss(0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (RANK, 24)
    assert optimizer.param_groups[0]["params"] == [model.weight] and len(optimizer.param_groups) == 1
    scheduler.close()


def test_a_basis_that_raises_leaves_everything_in_its_place() -> None:
    @register_projection("failing")
    class Failing(Projection):
        def basis(self, gradient: Tensor, previous: Tensor | None, context: ProjectionContext) -> Tensor:
            if context.steps:
                raise RuntimeError("no basis")
            return torch.eye(gradient.shape[0], self.rank, dtype=gradient.dtype)

    model = Regression(12, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(model, optimizer, projection="failing", projection_options={"rank": RANK})
    model.loss(0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    before = dict(optimizer.state[model.weight])
    with pytest.raises(RuntimeError, match="no basis"):
        optimizer.step()
    after = optimizer.state[model.weight]
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert optimizer.param_groups[0]["params"] == [model.weight] and len(optimizer.param_groups) == 1
    scheduler.close()


@pytest.mark.parametrize("name", list_projections())
def test_every_projection_trains_fused_experts(name: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 12, 24))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Experts()])

    model: Any = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(model, optimizer, projection=name, projection_options={"rank": RANK})
    first = float(model.layers[0].w.detach().square().sum())
    for _ in range(5):
        model.layers[0].w.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model.layers[0].w.detach().square().sum()) < first
    assert optimizer.state[model.layers[0].w]["exp_avg"].shape == (3, RANK, 24)
    scheduler.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, but got rank=0"),
        ({"scale": -1.0}, "scale must be positive, but got scale=-1"),
        ({"side": "top"}, "Option 'side' of projection 'galore'"),
        ({"update_gap": 0}, "update_gap must be at least 1 optimizer step"),
        ({"basis": "qr"}, "Option 'basis'"),
        ({"rnk": 4}, "Did you mean 'rank'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_projection("galore", options)


def test_weight_decay_of_an_unknown_optimizer_is_asked_for() -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 1e-2, "weight_decay": 0.1})

        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad + group["weight_decay"] * p.data, alpha=-group["lr"])

    model = Regression(12, 24)
    with pytest.raises(ConfigError, match="decoupled_weight_decay"):
        schedule(model, Mine(model.parameters()))
    optimizer = Mine(model.parameters())
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    losses = train(model, optimizer, 17)
    assert losses[16] < losses[8] < losses[0]  # the same batch
