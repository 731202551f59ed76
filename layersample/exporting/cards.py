"""Model cards: what a run was, in the README.md that the hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from layersample.config import TrainConfig
from layersample.exporting.manifest import Manifest
from layersample.exporting.names import is_hub_id, public_name

CARD = "README.md"

_MODEL = """---
{{ card_data }}
---

# {{ title }}

{{ base }}, fine-tuned with layersample: of {{ layers }} {{ unit }}s, {{ drawn }}
trained at a time.

| | |
|---|---|
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
"""
_DELTA = """---
{{ card_data }}
---

# What was trained of {{ base }}

A delta: the weights that differ from the base, and no others. {{ size }} Put the model together, to the bit:

```sh
layersample apply {{ base }} THIS_FOLDER --output MODEL
```

The base's content has the hash `{{ base_hash }}`; another one is refused.
{{ run }}"""


def model_card(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """The card of a run's model.

    Args:
        config: The run's options.
        summary: What it measured, as in ``summary.json``.
    """
    base = public_name(config.model)
    return str(
        ModelCard.from_template(
            _card_data(config.model, config.sampler, config.data),
            template_str=_MODEL,
            title=f"{base}, trained with {config.sampler}",
            base=base,
            layers=len(summary["layers"]),
            unit=config.granularity,
            drawn=_drawn(config),
            facts={name: value.replace("|", "\\|") for name, value in _facts(config, summary).items()},
        )
    )


def delta_card(manifest: Manifest, size: str, run: str) -> str:
    """The card of a delta.

    Args:
        manifest: What the delta says of itself.
        size: How large it is, in a sentence.
        run: The card of the model, if it has one.
    """
    return str(
        ModelCard.from_template(
            _card_data(manifest.base),
            template_str=_DELTA,
            base=manifest.base,
            size=size,
            base_hash=manifest.base_sha256,
            run=f"\n{ModelCard(run).text.strip()}\n" if run else "",
        )
    )


def _card_data(base: str, *words: str) -> ModelCardData:
    sampler, data = (*words, "", "")[:2]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        # The hub takes names of its own here, and refuses a card with others.
        base_model=base if is_hub_id(base) else None,
        datasets=[data] if is_hub_id(data) else None,
        tags=["layersample", "layer-sampling", *([sampler] if sampler else [])],
    )


def _facts(config: TrainConfig, summary: Mapping[str, Any]) -> dict[str, str]:
    loss, trainable = summary["held_out_loss"], summary["trainable_parameters"]
    parameters = summary["parameters"]
    facts = {
        "Base": public_name(config.model),
        "Data": public_name(config.data),
        "Sampler": f"{config.sampler}{_options(config.sampler_options)}, {config.granularity}s: "
        f"{_drawn(config)} in each period of {summary['period']} steps",
        "Projection": f"{config.projection}{_options(config.projection_arguments)}"
        if config.projection
        else "none",
        "Layers that trained": _layers(summary["steps_trained"]),
        "Embeddings, head, final norm": ", ".join(
            {"train": "trained", "freeze": "frozen", "sample": "sampled"}[rule]
            for rule in (config.embeddings, config.head, config.norm)
        ),
        "Parameters that trained at a time": f"{trainable['mean']:,.0f} of {parameters:,}",
        "Steps": f"{summary['steps']:,} of {_examples_of_a_step(config, summary)} examples",
        "Learning rate": f"{config.learning_rate:g}, {config.schedule}",
        "Precision": config.precision,
        "Seed": str(config.run_seed),
        "Held-out loss": f"{loss['before']:.4f} before, {loss['after']:.4f} after",
    }
    if saved := summary.get("held_out_loss_as_saved"):
        facts["Held-out loss, as saved"] = f"{saved['before']:.4f} before, {saved['after']:.4f} after"
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in _versions(summary).items())
    return facts


def _drawn(config: TrainConfig) -> str:
    """How many layers, or parts of them, a period trains."""
    return str(config.num_active) if config.draw_budget is None else f"as many as fit {config.draw_budget}"


def _examples_of_a_step(config: TrainConfig, summary: Mapping[str, Any]) -> int:
    ranks = len(summary["ranks"]["peak_bytes"]) if "ranks" in summary else 1
    return ranks * config.batch_size * config.gradient_accumulation


def _options(options: Mapping[str, Any] | None) -> str:
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def _layers(steps: Sequence[int]) -> str:
    trained = [index for index, count in enumerate(steps) if count]
    return f"{len(trained)} of {len(steps)}: {' '.join(map(str, trained)) or 'none'}"


def _versions(summary: Mapping[str, Any]) -> dict[str, str]:
    versions: dict[str, str] = summary["environment"]["versions"]
    return versions
