"""Layer sampling in PyTorch Lightning's Trainer: one callback."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from common import batches, model_and_tokenizer, parse
from torch.utils.data import DataLoader

from layersample.integrations.lightning import LayerSampling

options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
sampling = LayerSampling("lisa", num_active=2, period=5)


class Module(lightning.LightningModule):  # type: ignore[misc]  # of no known type without Lightning
    """A causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The model's own loss."""
        loss: torch.Tensor = self.model(**batch, use_cache=False).loss
        active = sampling.scheduler.active if sampling.scheduler is not None else ()
        print(f"step {index + 1}: loss {loss.item():.3f}, layers {active}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All parameters, while they all require a gradient."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


# Each element is a batch already.
loader: DataLoader[Any] = DataLoader(list(batches(options, tokenizer)), batch_size=None)  # type: ignore[arg-type]
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="auto",
    logger=False,
    enable_progress_bar=False,
    default_root_dir=options.output,
    callbacks=[sampling],
)
trainer.fit(Module(), loader)
