"""Layer sampling on many GPUs in a plain torch loop: DDP, or FSDP2 with checkpoints that any number of ranks loads.

Launch it with torchrun, as README.md beside it says; without GPUs it runs on gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from layersample import LayerScheduler, find_layers, measure_memory
from layersample.checkpoints.sharded import load_distributed, save_distributed
from layersample.training.data import load_data
from layersample.training.models import load_model


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["ddp", "fsdp"], default="fsdp")
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--data", default="gsm_symbolic", help="built-in name, file or hub id")
    parser.add_argument(
        "--steps", type=int, default=20, help="optimizer steps, those of a checkpoint included"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--checkpoint", help="folder to continue from, if it is there, and to save into")
    return parser.parse_args()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let one rank of each machine fetch and cache before the others read."""
    if os.environ["LOCAL_RANK"] != "0":
        dist.barrier()
    yield
    if os.environ["LOCAL_RANK"] == "0":
        dist.barrier()


def spread(model: nn.Module, engine: str) -> nn.Module:
    """Wrap or shard a model in which everything that may train requires a gradient."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in find_layers(model).layers:
        fully_shard(model.get_submodule(layer.name))
    fully_shard(model)
    return model


def batch_of(
    data: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, number: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """This rank's four examples of a batch: token ids and labels of shape ``(4, 192)`` at most."""
    first = 4 * (number * dist.get_world_size() + dist.get_rank())
    rows = [data[(first + i) % len(data)] for i in range(4)]
    texts = [row["prompt"] + row["completion"] + str(tokenizer.eos_token) for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=192).to(device)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def main() -> None:
    """Train."""
    options = parse()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    with first_rank_first():
        whole, tokenizer = load_model(options.model)
        data = load_data(options.data)
    whole.to(device)  # type: ignore[arg-type]
    model = spread(whole, options.engine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    state = None
    if options.checkpoint and Path(options.checkpoint).is_dir():
        state = load_distributed(options.checkpoint, model, optimizer)
    scheduler = LayerScheduler(
        model, optimizer, "lisa", num_active=2, period=2, seed=0, state_dict=state, check=True
    )
    model.train()
    for step in range(scheduler.steps, options.steps):
        for micro in range(options.accumulate):
            last = micro == options.accumulate - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            batch = batch_of(data, tokenizer, step * options.accumulate + micro, device)
            with (
                model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            ):
                loss = model(**batch).loss / options.accumulate
                loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            held = measure_memory(model, optimizer)
            print(
                f"step {step + 1}: loss {loss.item() * options.accumulate:.3f}, layers {scheduler.active}, here "
                f"{held.weights / 2**20:.1f} MiB of weights, {held.optimizer_state / 2**20:.1f} of optimizer state"
            )
        scheduler.step()
        optimizer.zero_grad()
    if options.checkpoint:
        save_distributed(options.checkpoint, model, optimizer, scheduler.state_dict())
    scheduler.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
