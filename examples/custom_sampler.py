"""A sampler of your own, in ten lines, in the place of a built-in one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from common import batches, model_and_tokenizer, parse

from layersample import LayerSampler, LayerScheduler, SamplingContext, register


@register("alternate")
class Alternate(LayerSampler):
    """Train even layers, then odd layers, in turn."""

    def sample(self, context: SamplingContext) -> Iterable[int]:
        """Return every second layer."""
        return range(context.round % 2, context.num_layers, 2)


if __name__ == "__main__":
    options = parse(__doc__)
    model, tokenizer = model_and_tokenizer(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with LayerScheduler(
        model, optimizer, "alternate", period=2, embeddings="freeze", check=True
    ) as scheduler:
        for batch in batches(options, tokenizer):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            print(f"step {scheduler.steps + 1}: loss {loss.item():.3f}, layers {scheduler.active}")
            scheduler.step()
            optimizer.zero_grad()
