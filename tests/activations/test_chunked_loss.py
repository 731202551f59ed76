from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from layersample import ChunkedLoss, ConfigError, LayerSamplingCallback, LayerScheduler
from layersample.activations.chunked_cross_entropy import chunked_cross_entropy
from tests.helpers import causal_lm, make_batch, make_llama


def masked_batch(size: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    tokens = make_batch(1, size)["input_ids"][:, :length]
    labels = tokens.clone()
    labels[0, :7] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def run(model: nn.Module, batch: dict[str, Any], chunk_size: int | None) -> tuple[Any, dict[str, Any]]:
    model = copy.deepcopy(model)
    if chunk_size is None:
        loss = model(**batch, use_cache=False).loss
    else:
        with ChunkedLoss(model, chunk_size=chunk_size):
            output = model(**batch, use_cache=False)
        assert output.logits is None
        loss = output.loss
    (loss * 3).backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, batch: dict[str, Any], chunk_size: int = 5, rtol: float = 1e-12) -> None:
    plain_loss, plain = run(model, batch, None)
    loss, gradients = run(model, batch, chunk_size)
    torch.testing.assert_close(loss, plain_loss, rtol=rtol, atol=rtol)
    assert plain.keys() == gradients.keys()
    for name in plain:
        torch.testing.assert_close(
            gradients[name], plain[name], rtol=rtol, atol=rtol * plain[name].abs().max()
        )


@pytest.fixture(autouse=True)
def _double_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers turns fp64 logits into fp32; not here, so that 1e-12 can be asked for."""
    import transformers.loss.loss_utils as utils

    class Kept(torch.Tensor):
        def float(self) -> Any:
            return self.as_subclass(torch.Tensor)

    original = utils.ForCausalLMLoss

    def exact(logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
        return original(
            logits.as_subclass(Kept) if logits.dtype == torch.float64 else logits,
            labels,
            vocab_size,
            **kwargs,
        )

    monkeypatch.setitem(utils.LOSS_MAPPING, "ForCausalLM", exact)


@pytest.mark.parametrize("chunk_size", [1, 5, 17, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_is_the_plain_loss_with_its_gradients(tied: bool, chunk_size: int) -> None:
    assert_same(causal_lm("llama", tie_word_embeddings=tied), masked_batch(), chunk_size)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.07}),
        ("granite", {"logits_scaling": 7.0}),
        ("phi", {}),  # its head has a bias
        ("gpt2", {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    ],
)
def test_what_models_do_to_their_logits_is_found(kind: str, options: dict[str, Any]) -> None:
    assert_same(causal_lm(kind, **options), masked_batch())


def test_items_of_the_whole_batch_divide_and_micro_batches_add_up() -> None:
    model, batch = causal_lm("llama"), masked_batch(4)
    assert_same(model, {**batch, "num_items_in_batch": torch.tensor(31)})
    items = int((batch["labels"][:, 1:] != -100).sum())
    _, whole = run(model, batch, 5)
    halves = [{name: t[rows] for name, t in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    parts = [run(model, {**half, "num_items_in_batch": items}, 5)[1] for half in halves]
    for name in whole:  # Llama's norms work in float32 even here
        both, size = parts[0][name] + parts[1][name], whole[name].abs().max()
        torch.testing.assert_close(both, whole[name], rtol=1e-5, atol=1e-6 * size)


def test_frozen_heads_and_layers_get_no_gradient() -> None:
    model = causal_lm("llama")
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    assert_same(model, masked_batch())
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert_same(model, masked_batch())


def test_without_a_graph_no_gradient_is_formed() -> None:
    """As in the trial, where a head's gradient would be as large as the head."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)

    class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen: set[torch.Size] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "detach" not in str(func):
                self.seen.add(out.shape)
            return out

    for graph in (True, False):
        with torch.set_grad_enabled(graph), Shapes() as shapes:
            loss = chunked_cross_entropy(hidden, weight, None, torch.arange(6))
        assert (weight.shape in shapes.seen) == graph
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(6))
        )


def test_a_model_that_is_its_own_base_is_tried_as_well() -> None:
    class WithZLoss(LlamaForCausalLM):
        base_model_prefix = "none"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss + output.logits.logsumexp(-1).pow(2).mean()
            return output

    model = WithZLoss(make_llama().config).train()
    assert model.base_model is model
    with pytest.raises(ConfigError, match="does more with its logits"):
        ChunkedLoss(model)


def test_the_trial_computes_the_layers_once() -> None:
    model = make_llama().train()
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with ChunkedLoss(model):
        assert len(calls) == 1
        model(**make_batch())
    assert len(calls) == 2


class OfItsOwn(LlamaForCausalLM):
    """A model whose forward needs more of its layers than their output."""

    def loss_of(self, hidden: torch.Tensor, labels: torch.Tensor) -> CausalLMOutputWithPast:
        logits = self.lm_head(hidden)
        return CausalLMOutputWithPast(
            loss=self.loss_function(logits, labels, self.config.vocab_size), logits=logits
        )


class WritesToTheOutput(OfItsOwn):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, use_cache=False).last_hidden_state
        return self.loss_of(hidden.mul_(1.5), labels)


class TakesWhatLayersLeft(OfItsOwn):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        left: list[torch.Tensor] = []
        handle = self.model.norm.register_forward_hook(lambda module, given, output: left.append(output))
        output = self.loss_of(self.model(input_ids, use_cache=False).last_hidden_state, labels)
        handle.remove()
        assert output.loss is not None
        output.loss = output.loss + left.pop().square().mean()
        return output


class ReadsItsOwnGuesses(OfItsOwn):
    """Its layers see what its logits say."""

    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, use_cache=False).last_hidden_state
        guesses = self.lm_head(hidden).argmax(-1)
        return self.loss_of(self.model(guesses, use_cache=False).last_hidden_state, labels)


@pytest.mark.parametrize("kind", [WritesToTheOutput, TakesWhatLayersLeft])
def test_a_model_that_needs_its_layers_computed_is_taken(kind: Any) -> None:
    assert_same(kind(make_llama().config).double(), masked_batch())


def test_a_model_whose_layers_see_its_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match="does more with its logits"):
        ChunkedLoss(ReadsItsOwnGuesses(make_llama().config).train())


def test_shifted_labels_and_another_ignore_index() -> None:
    batch = masked_batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert_same(causal_lm("llama"), {**batch, "shift_labels": shifted})
    batch["labels"][batch["labels"] == -100] = 7
    assert_same(causal_lm("llama"), {**batch, "ignore_index": 7})


def test_without_any_label_the_loss_is_what_it_was() -> None:
    batch = masked_batch()
    batch["labels"].fill_(-100)
    model = causal_lm("llama")
    assert torch.isnan(run(model, batch, None)[0]) and torch.isnan(run(model, batch, 5)[0])
    loss, gradients = run(model, {**batch, "num_items_in_batch": 3}, 5)
    assert loss == 0 and all(g.eq(0).all() for g in gradients.values())


def test_half_precision_is_as_close_as_the_plain_loss() -> None:
    model, batch = causal_lm("llama"), masked_batch(8)
    _, exact = run(model, batch, None)
    _, plain = run(model.bfloat16(), batch, None)
    _, chunked = run(model, batch, 16)

    def error(found: dict[str, Any], name: str) -> float:
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    assert error(chunked, "model.layers.0.mlp.up_proj.weight") < 0.05
    assert error(chunked, "lm_head.weight") < 1.5 * error(plain, "lm_head.weight")


def test_autocast_is_that_of_the_plain_loss() -> None:
    model, batch = causal_lm("llama").float(), masked_batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, batch, rtol=2e-2)
    assert run(model, batch, 5)[1]["lm_head.weight"].dtype == torch.float32


def test_logits_never_exist_whole() -> None:
    class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == 260:
                self.rows = max(self.rows, out.numel() // 260)
            return out

    model = make_llama().train()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with ChunkedLoss(model, chunk_size=4), Widest() as widest:  # type: ignore[no-untyped-call]
        model(**make_batch(size=4)).loss.backward()
    assert widest.rows == 16  # the transposed weight (16, 260); 44 positions have a label


def test_eval_mode_and_calls_without_labels_are_as_they_were() -> None:
    model, batch = make_llama().train(), make_batch()
    logits = model(**batch).logits
    with ChunkedLoss(model):
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)
        assert model(**batch).logits is None
        model.eval()
        assert torch.equal(model(**batch).logits, logits)
        assert model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 14)
    model.train()
    assert torch.equal(model(**batch).logits, logits)
    assert "_loss_function" not in vars(model) and "forward" not in vars(model.lm_head)


def test_backward_goes_through_it_once() -> None:
    model = make_llama().train()
    with ChunkedLoss(model):
        loss = model(**make_batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Backward can go once through a chunked loss"):
        loss.backward()


def test_models_that_have_no_such_loss_are_refused() -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    t5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    llama = make_llama()
    for model, message in [
        (LlamaModel(llama.config), "needs a language model with a linear head, but LlamaModel has none"),
        (nn.Linear(2, 2), "but Linear has none"),
        (BertForMaskedLM(BertConfig(vocab_size=64, **small)), "is that of the next token"),
        (T5ForConditionalGeneration(t5), "is that of the next token"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ChunkedLoss(model)
    with pytest.raises(
        ConfigError, match="chunk_size must be greater than or equal to 1, but got chunk_size=0"
    ):
        ChunkedLoss(llama, chunk_size=0)


def test_a_tail_that_it_does_not_know_is_refused() -> None:
    model = make_llama().train()
    model.lm_head.register_forward_hook(lambda module, args, output: output**2)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does something else"):
        ChunkedLoss(model)
    assert "forward" not in vars(model.lm_head)


def test_a_model_that_goes_around_its_loss_is_told() -> None:
    model = make_llama().train()
    original = model.forward
    model.forward = lambda labels=None, **kwargs: original(**kwargs)
    with ChunkedLoss(model), pytest.raises(RuntimeError, match="calls its head and then its loss_function"):
        model(**make_batch())


def test_backward_still_ends_at_the_lowest_active_layer() -> None:
    model = make_llama(tie=True).train()
    optimizer = torch.optim.AdamW(model.parameters())
    with ChunkedLoss(model), LayerScheduler(model, optimizer, "lisa", embeddings="sample") as scheduler:
        for _ in range(3):
            model(**make_batch()).loss.backward()
            trained = {name for name, p in model.named_parameters() if p.grad is not None}
            assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_callback_brings_it_to_the_trainer(tmp_path: Any, autocast: bool) -> None:
    losses = []
    for chunk in (None, 5):
        model = make_llama()
        rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(8)]
        args = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=autocast,
            gradient_accumulation_steps=2,
            dataloader_pin_memory=False,
        )
        callback = LayerSamplingCallback("lisa", loss_chunk=chunk, recompute=chunk is not None)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert "forward" not in vars(model.lm_head) and not model._forward_hooks
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if autocast else 1e-6)


def test_a_tuple_holds_the_model_s_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    model, more = make_llama(), {"return_dict": False}
    own = model(**masked_batch(), use_cache=False, **more)
    with ChunkedLoss(model):
        for _ in range(2):
            loss, logits = model(**masked_batch(), use_cache=False, **more)[:2]
    assert torch.equal(loss, own[0]) and torch.equal(logits, own[1])
    assert caplog.text.count("computes its own loss where it returns a tuple") == 1


@pytest.mark.parametrize("keep", [4, torch.arange(8, 12)])
def test_logits_that_are_asked_for_are_there(keep: Any) -> None:
    model, batch = make_llama(), masked_batch()
    batch["labels"] = batch["labels"][:, 8:]
    own = model(**batch, logits_to_keep=keep, use_cache=False)
    with ChunkedLoss(model):
        found = model(**batch, logits_to_keep=keep, use_cache=False)
        assert torch.equal(found.loss, own.loss) and torch.equal(found.logits, own.logits)
        assert model(**masked_batch(), logits_to_keep=0, use_cache=False).logits is None


def test_labels_of_some_positions_alone_are_refused() -> None:
    """As the model's own loss does; here they would have been taken for those of other positions."""
    model, batch = make_llama(), masked_batch()
    batch["labels"] = batch["labels"][:, 8:]
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch)
    with ChunkedLoss(model), pytest.raises(ValueError, match="each of the 24 positions.*but got 8 labels"):
        model(**batch)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_replaced_is_followed(tied: bool) -> None:
    model = make_llama(dtype=torch.float64, tie=tied)
    first = model.lm_head
    with ChunkedLoss(model, chunk_size=5) as chunked:
        model(**masked_batch(), use_cache=False)
        model.resize_token_embeddings(264)
        if not tied:
            model.lm_head = nn.Linear(model.config.hidden_size, 264, bias=True).double()
        found = model(**masked_batch(), use_cache=False)
        assert found.logits is None
        chunked.close()
        assert "forward" not in vars(model.lm_head) and "forward" not in vars(first)
        assert torch.allclose(found.loss, model(**masked_batch(), use_cache=False).loss, rtol=1e-12)


def test_a_head_that_is_replaced_by_another_kind_is_refused() -> None:
    model = make_llama()
    with ChunkedLoss(model):
        model.lm_head = nn.Sequential(nn.Linear(model.config.hidden_size, 260))
        with pytest.raises(ConfigError, match="Sequential, since the head was replaced.*--loss-chunk 0"):
            model(**masked_batch())
        assert model(**masked_batch()).logits is not None  # its own from then on
