"""Layer sampling in TRL's RewardTrainer: a model that scores worked solutions above those of other problems."""

from __future__ import annotations

from common import pairs, parse, show_steps
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from layersample import LayerSamplingCallback
from layersample.training.models import fetch_folder, load_tokenizer

options = parse(__doc__)
trainer = RewardTrainer(
    model=AutoModelForSequenceClassification.from_pretrained(
        fetch_folder(options.model, print), num_labels=1
    ),
    processing_class=load_tokenizer(options.model, print),
    args=RewardConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        max_length=192,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=pairs(options),
)
# The head is new, so it trains all the time; that is the default.
LayerSamplingCallback("lisa", num_active=2, period=5, head="train").attach(trainer)
trainer.train()
show_steps(trainer)
