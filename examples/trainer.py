"""Layer sampling in Hugging Face's Trainer: one callback."""

from __future__ import annotations

from common import batches, model_and_tokenizer, parse, show_steps
from transformers import Trainer, TrainingArguments

from layersample import LayerSamplingCallback

options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
rows = [{k: v[0].tolist() for k, v in batch.items()} for batch in batches(options, tokenizer, size=1)]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    callbacks=[LayerSamplingCallback("lisa", num_active=2, period=5)],
)
trainer.train()
show_steps(trainer)
