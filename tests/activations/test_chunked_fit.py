"""Which models a chunked loss is refused for, and that it is the same as their own where it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from layersample import ChunkedLoss, ConfigError
from layersample.activations.chunked_loss import why_not_chunked
from layersample.activations.save_memory import save_memory
from layersample.versions import checkpoint_activations
from tests.helpers import causal_lm, make_batch, make_llama

TEXT = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def multimodal(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "llava":
        config: Any = transformers.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 16, "patch_size": 8},
            image_token_index=259,
        )
        model = transformers.LlavaForConditionalGeneration(config).train()
        return model
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
        image_token_index=259,
        boi_token_index=257,
        eoi_token_index=258,
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).train()
    return model


class OwnLoss(nn.Module):
    """Installs what it says on a model, in place of the loss of the next token."""

    @staticmethod
    def squared(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return logits.float().square().mean()


def with_loss_function() -> nn.Module:
    model = make_llama()
    model.loss_function = OwnLoss.squared
    return model


def with_loss_type() -> nn.Module:
    model = make_llama()
    model.loss_type = "ForMaskedLM"
    return model


def with_lora_on_the_head() -> nn.Module:
    return get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def with_a_copied_head() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(make_llama(), config)


def with_z_loss(coefficient: float = 1e-4) -> nn.Module:
    model: nn.Module = causal_lm("bamba", **MAMBA, z_loss_coefficient=coefficient).float()
    return model


def with_a_patched_head() -> nn.Module:
    model = make_llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 2
    return model


def with_an_unshifted_loss() -> nn.Module:
    model = make_llama()
    forward = model.forward

    def unshifted(labels: Any = None, **kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.loss = nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
        return output

    model.forward = unshifted
    return model


def with_a_term_of_its_own() -> nn.Module:
    model = make_llama()

    def penalized(module: nn.Module, args: Any, output: Any) -> None:
        if output.loss is not None:
            output.loss = output.loss + 0.01 * output.logits.float().square().mean()

    model.register_forward_hook(penalized)
    return model


REFUSED = {
    with_loss_function: "has a loss_function of its own, OwnLoss.squared",
    with_loss_type: "is trained on ForMaskedLMLoss",
    with_lora_on_the_head: "the head of LlamaForCausalLM is a peft.tuners.lora",
    with_a_copied_head: "the head of LlamaForCausalLM is a peft",
    with_z_loss: "does more with its logits",
    with_a_patched_head: "forward of LlamaForCausalLM's head has been replaced",
    with_an_unshifted_loss: "calls its head and then its loss_function, but LlamaForCausalLM doesn't",
    with_a_term_of_its_own: "does more with its logits",
}


def state(model: nn.Module) -> Any:
    return [
        (dict(vars(m)).keys(), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for m in model.modules()
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("make", REFUSED)
def test_a_loss_that_is_not_that_of_the_next_token_alone_is_refused_by_name(make: Any) -> None:
    model = make().train()
    before = state(model)
    with pytest.raises(ConfigError, match=f"{REFUSED[make]}.*--loss-chunk 0"):
        ChunkedLoss(model)
    reason = why_not_chunked(model)
    assert reason is not None and "loss_chunk=None" in reason
    assert state(model) == before


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_text_of_multimodal_models_is_the_same_in_chunks(kind: str) -> None:
    model, batch = multimodal(kind), make_batch()
    if kind == "gemma3":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    own = model(**batch).loss
    with save_memory(model, loss_chunk=5, recompute=False, strict=False):
        torch.testing.assert_close(model(**batch).loss, own, rtol=1e-5, atol=1e-5)


def test_a_model_without_the_property_is_refused_with_the_version() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head, self.config, self.loss_function = nn.Linear(4, 8), None, OwnLoss.squared

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    reason = why_not_chunked(Own())
    assert reason is not None and f"transformers {transformers.__version__} is installed" in reason


def test_what_the_room_uses_of_transformers_that_is_private_is_there() -> None:
    model = make_llama().train()
    checkpoint_activations(model, {"use_reentrant": True})
    assert model.get_input_embeddings() is not None
    assert any(getattr(module, "_require_grads_hooks", None) for module in model.modules())
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords == {
        "use_reentrant": True
    }
    model.loss_function = OwnLoss.squared
    assert vars(model)["_loss_function"] is OwnLoss.squared


def test_models_that_only_scale_or_have_no_z_loss_are_let_through() -> None:
    assert why_not_chunked(with_z_loss(0.0)) is None
    for kind, options in (
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.07}),
        ("granite", {"logits_scaling": 7.0}),
        ("gpt2", {}),
    ):
        assert why_not_chunked(causal_lm(kind, **options).bfloat16()) is None, kind
    assert why_not_chunked(make_llama(tie=True).half()) is None


def test_the_trial_leaves_no_trace() -> None:
    model = causal_lm("gpt2").float().train()  # with dropout
    model.transformer.h[0].eval()
    before, randomness = state(model), torch.get_rng_state()
    ChunkedLoss(model).close()
    assert state(model) == before and torch.equal(torch.get_rng_state(), randomness)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_where_nobody_asked_for_it_the_model_keeps_its_loss_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = with_z_loss().train(), make_batch()
    own = model(**batch).loss
    said = "BambaForCausalLM keeps its own loss"
    for _ in range(2):
        with save_memory(model, loss_chunk=5, recompute=False, strict=False):
            assert torch.equal(model(**batch).loss, own)
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ConfigError, match="does more with its logits"):
        save_memory(model, loss_chunk=5, recompute=False)
