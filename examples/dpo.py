"""Layer sampling in TRL's DPOTrainer: worked solutions against those of other problems."""

from __future__ import annotations

from common import model_and_tokenizer, pairs, parse, show_steps
from trl import DPOConfig, DPOTrainer

from layersample import LayerSamplingCallback

options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    args=DPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        max_length=192,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=pairs(options),
)
# Without a reference model of its own, DPO takes the weights as they are when the trainer is made.
LayerSamplingCallback("lisa", num_active=2, period=5).attach(trainer)
trainer.train()
show_steps(trainer)
