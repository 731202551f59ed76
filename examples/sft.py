"""Layer sampling in TRL's SFTTrainer: one callback; attached, so that TensorBoard or W&B show the layers too."""

from __future__ import annotations

from common import model_and_tokenizer, parse, show_steps
from trl import SFTConfig, SFTTrainer

from layersample import LayerSamplingCallback
from layersample.training.data import load_data

options = parse(__doc__)
model, tokenizer = model_and_tokenizer(options)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=192,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_data(options.data),
)
LayerSamplingCallback("cyclic", num_active=2, period=5, embeddings="sample", state="offload").attach(trainer)
trainer.train()
show_steps(trainer)
