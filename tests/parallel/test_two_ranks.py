"""Two ranks on this machine: what they check (ranks_ddp, ranks_fsdp) shows as a test each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layersample import ConfigError, LayerSamplingCallback, LayerScheduler
from layersample.checkpoints.sharded import load_distributed, save_distributed, stored_state
from layersample.parallel.agreement import check_agreement, is_distributed
from layersample.unwrapping import local_part
from tests.helpers import make_llama
from tests.parallel.ranks import NUM_LAYERS, assert_close, checks_of, launch, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
Launched = tuple[set[str], str, Path]


def launched(module: str, factory: pytest.TempPathFactory) -> Launched:
    folder = factory.mktemp(module)
    passed, output = launch(module, folder)
    return passed, output, sorted(path for path in folder.iterdir() if path.is_dir())[-1]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launched("ranks_ddp", tmp_path_factory)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launched("ranks_fsdp", tmp_path_factory)


@pytest.mark.parametrize("check", checks_of("ranks_ddp"))
def test_ddp_on_two_ranks(check: str, ddp: Launched) -> None:
    assert check in ddp[0], ddp[1]


@pytest.mark.parametrize("check", checks_of("ranks_fsdp"))
def test_fsdp2_on_two_ranks(check: str, fsdp: Launched) -> None:
    assert check in fsdp[0], fsdp[1]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_trainer_on_two_ranks_is_the_trainer_on_one(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from tests.parallel.ranks_ddp import trainer

    folder = request.getfixturevalue(engine)[2]
    alone = trainer(tmp_path, gradient_accumulation_steps={"ddp": 1, "fsdp": 2}[engine])
    LayerSamplingCallback("lisa", period=2, seed=1).attach(alone)
    alone.train()
    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    model.load_state_dict(torch.load(folder / "trainer.pt", weights_only=True))
    assert_close(model, alone.model)


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_a_checkpoint_of_two_ranks_continues_on_one(state: Any, fsdp: Launched) -> None:
    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loaded = load_distributed(fsdp[2] / f"{state}-5", model, optimizer)
    scheduler = LayerScheduler(
        model, optimizer, "lisa", period=2, seed=1, state=state, state_dict=loaded, check=True
    )
    train(model, optimizer, scheduler, range(5, 8))
    after = make_llama(NUM_LAYERS, dtype=torch.float64)
    after.load_state_dict(torch.load(fsdp[2] / f"{state}-after.pt", weights_only=True))
    assert_close(model, after)


@pytest.mark.parametrize(("state", "at"), [("drop", 3), ("drop", 4), ("keep", 4), ("offload", 4)])
def test_a_projected_checkpoint_of_two_ranks_continues_on_one(state: Any, at: int, fsdp: Launched) -> None:
    from tests.parallel.ranks_fsdp import projected

    model = make_llama(NUM_LAYERS, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    more = projected(state)
    place = fsdp[2] / f"projected-{state}-False-{at}"
    loaded = load_distributed(place, model, optimizer, more["projection"])
    scheduler = LayerScheduler(
        model, optimizer, "lisa", period=2, seed=1, state_dict=loaded, check=True, **more
    )
    train(model, optimizer, scheduler, range(at, 7))
    after = make_llama(NUM_LAYERS, dtype=torch.float64)
    after.load_state_dict(torch.load(f"{place}-after.pt", weights_only=True))
    assert_close(model, after, 1e-7)


def test_one_process_needs_no_agreement_and_holds_whole_tensors() -> None:
    assert not is_distributed()
    check_agreement(["a"], round=0)
    tensor = torch.zeros(3)
    assert local_part(tensor) is tensor


def test_a_checkpoint_in_one_process_continues_to_the_bit(tmp_path: Path) -> None:
    def start() -> tuple[Any, torch.optim.Optimizer]:
        model = make_llama(tie=True)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, optimizer = start()
    scheduler = LayerScheduler(whole, optimizer, "lisa", num_active=1, period=2, seed=1)
    train(whole, optimizer, scheduler, range(3))
    left = tmp_path / ".saved.new" / "__7_0.distcp"  # by a save on more ranks that was killed
    left.parent.mkdir()
    left.write_bytes(b"half")
    for _ in range(2):  # the second one takes the place of the first
        save_distributed(tmp_path / "saved", whole, optimizer, scheduler.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (tmp_path / "saved" / left.name).exists()
    names = set(stored_state(tmp_path / "saved"))
    assert names == {name for name, p in whole.named_parameters() if p in optimizer.state}
    train(whole, optimizer, scheduler, range(3, 6))

    part, other = start()
    loaded = load_distributed(tmp_path / "saved", part, other)
    resumed = LayerScheduler(part, other, "lisa", num_active=1, period=2, seed=1, state_dict=loaded)
    train(part, other, resumed, range(3, 6))
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in part.named_parameters())


def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    model = make_llama()
    with pytest.raises(ConfigError, match="must be a checkpoint"):
        load_distributed(tmp_path, model, torch.optim.AdamW(model.parameters()))
