"""Layer sampling in a plain torch loop: three lines more."""

from __future__ import annotations

import torch
from common import batches, model_and_tokenizer, parse

from layersample import LayerScheduler, measure_memory

options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
scheduler = LayerScheduler(model, optimizer, "lisa", num_active=2, period=5, seed=0)
for batch in batches(options, tokenizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    print(
        f"step {scheduler.steps + 1}: loss {loss.item():.3f}, layers {scheduler.active}, "
        f"optimizer state {measure_memory(model, optimizer).optimizer_state / 2**20:.0f} MiB"
    )
    scheduler.step()
    optimizer.zero_grad()
scheduler.close()
