"""Layer sampling in ms-swift.

    swift sft --model HuggingFaceTB/SmolLM2-135M-Instruct --tuner_type full \
        --dataset AI-ModelScope/alpaca-gpt4-data-en#500 --external_plugins plugin.py --callbacks layersample
"""

from __future__ import annotations

from layersample.integrations.ms_swift import register

register(sampler="lisa", num_active=2, period=20, embeddings="freeze", head="freeze")
