"""Layer sampling on many GPUs in TRL's SFTTrainer: the same script for torchrun and accelerate launch.

DDP by default; FSDP2 with accelerate's configuration ``fsdp2.yaml`` beside it. README.md has the launch lines.
"""

from __future__ import annotations

import argparse

import torch
from torch import distributed as dist
from trl import SFTConfig, SFTTrainer

from layersample import LayerSamplingCallback
from layersample.training.data import load_data
from layersample.training.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
parser.add_argument("--data", default="gsm_symbolic", help="built-in name, file or hub id")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
parser.add_argument("--output", default="runs/example", help="folder for the Trainer's files")
options = parser.parse_args()

arguments = SFTConfig(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=4,
    max_length=192,
    learning_rate=3e-4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    # The scheduler builds DDP's buckets anew at each switch, so there is nothing to look for.
    ddp_find_unused_parameters=False,
)
with arguments.main_process_first():  # one rank of each machine fetches and caches
    model, tokenizer = load_model(options.model)
    data = load_data(options.data)
trainer = SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=data)
# Attached, not in callbacks=: a callback never sees the wrapped model.
LayerSamplingCallback("lisa", num_active=2, period=2, check=True).attach(trainer)
trainer.train()
if trainer.is_world_process_zero():
    print(f"{arguments.world_size} ranks")
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"step {record['step']}: loss {record['loss']:.3f}, layers {record['active_layers']}")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
