from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

from layersample import (
    ConfigError,
    LayerSampler,
    LayerScheduler,
    Measurement,
    SamplingContext,
    find_layers,
    register,
)
from layersample.cli import app as cli
from layersample.cli.profile_report import print_profile, write_profile
from layersample.metrics import layer_metrics, lora_norms, outlier_ratios
from layersample.plots import plot_profile
from layersample.profiling.profile import profile
from layersample.training.models import load_any_model
from tests.helpers import make_batch, make_llama

SAMPLERS = ("lisa", ("owlore", {"metric": "alpha"}))
ALPHA = "owlore:metric=alpha"


def make_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=260, n_positions=64))


def make_t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    sizes["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(vocab_size=260, **sizes))


def make_bert() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=260, num_hidden_layers=3, **sizes))


def make_vit() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return ViTModel(ViTConfig(num_hidden_layers=2, image_size=16, patch_size=8, **sizes))


def tokens(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    if isinstance(model, ViTModel):
        return [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    return [{k: v for k, v in make_batch().items() if k == "input_ids" or model.can_generate()}]


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_t5, make_bert, make_vit])
@pytest.mark.parametrize("with_data", [False, True])
def test_any_model(make: Any, with_data: bool) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = tokens(model) if with_data else None
    found = profile(model, samplers=SAMPLERS, batches=batches, cache=False)
    layers = find_layers(model).layers
    assert [layer.name for layer in found.layers] == [layer.name for layer in layers]
    reference = layer_metrics(model, cache=False)
    for metric in ("alpha", "hill", "stable_rank"):
        assert [getattr(layer, metric) for layer in found.layers] == list(reference.by_layer(metric).values())
    if batches is None:
        assert {layer.outlier_percent for layer in found.layers} == {None}
        assert "No outliers: they need calibration data, and none was given." in found.notes
    else:
        ratios = outlier_ratios(model, batches, thresholds=(5.0,))
        assert [layer.outlier_percent for layer in found.layers] == [ratio[5.0] for ratio in ratios.values()]
        assert not any("outliers" in note for note in found.notes)
    # Of all of these, only T5's table of relative positions is too small for some of the metrics.
    assert all("outliers" in note or "relative_attention_bias" in note for note in found.notes)
    for sampler in ("lisa", ALPHA):
        assert sum(layer.probabilities[sampler] or 0 for layer in found.layers) == pytest.approx(1)
        assert sum(layer.inclusion[sampler] or 0 for layer in found.layers) == pytest.approx(2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_probabilities_are_those_of_the_alphas_beside_them() -> None:
    found = profile(make_llama(), samplers=SAMPLERS, cache=False)
    tails = [1 / (layer.alpha or 0) for layer in found.layers]
    expected = [tail / sum(tails) for tail in tails]
    assert [layer.probabilities[ALPHA] for layer in found.layers] == pytest.approx(expected)
    assert {layer.probabilities["lisa"] for layer in found.layers} == {0.25}
    assert {layer.inclusion["lisa"] for layer in found.layers} == {0.5}


@pytest.mark.parametrize("frozen", [False, True])
def test_costs_are_those_of_a_run(frozen: bool) -> None:
    model = make_llama()
    model.get_input_embeddings().requires_grad_(not frozen)  # then the lower layers are dearer
    options = {"weights": "uniform", "cost": "flops"}
    found = profile(model, samplers=[("prior", options)], cache=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with LayerScheduler(model, optimizer, "prior", sampler_options=options) as scheduler:
        expected = scheduler.inclusion_probabilities
    inclusion = [layer.inclusion["prior:weights=uniform,cost=flops"] for layer in found.layers]
    assert inclusion == expected and (len(set(inclusion)) == 4) == frozen


def test_sizes_count_each_parameter_once() -> None:
    model = make_llama()
    found = profile(model, cache=False)
    assert [layer.num_parameters for layer in found.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in model.model.layers
    ]


def test_a_layer_without_a_metric_is_noted_and_the_others_have_theirs() -> None:
    model = make_llama()
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.zero_()
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    found = profile(model, samplers=SAMPLERS, cache=False)
    assert found.layers[1].alpha is found.layers[1].stable_rank is None
    assert found.layers[0].alpha is not None and found.layers[2].alpha is not None
    assert any(
        n.startswith("No alpha of model.layers.1.") and "and 2 more" in n and "zero" in n for n in found.notes
    )
    assert any("No hill of model.layers.2.mlp.up_proj.weight: " in n for n in found.notes)
    # The sampler can't do without that layer, and says so.
    assert {layer.probabilities[ALPHA] for layer in found.layers} == {None}
    assert any(n.startswith(f"No probabilities of {ALPHA}") for n in found.notes)


def test_layers_without_matrices_are_noted() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.LayerNorm(4) for _ in range(3))})
    found = profile(model, samplers=("lisa",), layers="layers")
    assert [layer.alpha for layer in found.layers] == [None] * 3
    assert any("No spectra: " in note for note in found.notes)
    assert found.layers[0].probabilities["lisa"] == pytest.approx(1 / 3)


def test_a_sampler_that_needs_data_says_so_and_the_others_are_measured() -> None:
    found = profile(make_llama(), samplers=("lisa", "owlore", "lora_norm"), cache=False)
    assert found.layers[0].probabilities == {"lisa": 0.25, "owlore": None, "lora_norm": None}
    notes = "\n".join(found.notes)
    assert "No probabilities of owlore: The sampler 'owlore' counts outliers on calibration batches" in notes
    assert "No probabilities of lora_norm: " in notes and "needs an adapter folder" in notes


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_sampler_that_trains_on_the_batches_leaves_no_trace() -> None:
    model = make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = profile(model, samplers=[("lora_norm", {"probe_steps": 2})], batches=[make_batch()], cache=False)
    assert sum(layer.probabilities["lora_norm:probe_steps=2"] or 0 for layer in found.layers) == (
        pytest.approx(1)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Odd(LayerSampler):
    """Goes wrong in the way that it is told."""

    def __init__(self, *, way: str) -> None:
        self.way = way

    def measure(self, measurement: Measurement) -> None:
        if self.way == "raise":
            raise KeyError("no such thing")

    def sample(self, context: SamplingContext) -> list[int]:
        return [0]

    def inclusion_probabilities(self, context: SamplingContext) -> Sequence[float] | None:
        return {"unknown": None, "short": [1.0], "nan": [float("nan")] * 4}.get(self.way, [0.0] * 4)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("raise", "KeyError: 'no such thing'"),
        ("unknown", "doesn't say how likely"),
        ("short", "4 finite numbers"),
        ("nan", "4 finite numbers"),
        ("zero", "ZeroDivisionError"),
    ],
)
def test_a_user_s_sampler_that_goes_wrong(way: str, message: str) -> None:
    register("odd")(_Odd)
    found = profile(make_llama(), samplers=[("odd", {"way": way})], cache=False)
    assert found.layers[0].inclusion == {f"odd:way={way}": None}
    assert any(f"No probabilities of odd:way={way}: " in n and message in n for n in found.notes)


def test_what_a_sampler_warns_of_is_noted() -> None:
    found = profile(
        make_llama(), samplers=[("owlore", {"threshold": 1e6})], batches=[make_batch()], cache=False
    )
    assert any("At M=1e+06 too few of the 4 layers" in note for note in found.notes)


def test_the_column_of_outliers_is_that_of_the_sampler_beside_it() -> None:
    samplers = [("owlore", {"threshold": 7.0}), ("owlore", {"threshold": 3.0})]
    found = profile(make_llama(), samplers=samplers, batches=[make_batch()], cache=False, num_active=1)
    served = found.threshold
    assert served in (3.0, 5.0, 7.0)  # that of the first, where enough layers have outliers
    rows = found.to_rows()
    assert [row["outlier_percent"] for row in rows] == [row["score:owlore:threshold=7.0"] for row in rows]
    disagree = [n for n in found.notes if "counts outliers above" in n]
    assert len(disagree) == (served != 3.0)
    given = profile(make_llama(), samplers=samplers[:1], batches=[make_batch()], cache=False, threshold=2.0)
    assert given.threshold == 2.0
    assert any("the column those above 2 times" in note for note in given.notes)
    assert profile(make_llama(), batches=[make_batch()], cache=False).threshold == 5.0


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_what_a_sampler_measured_is_shown() -> None:
    samplers: list[Any] = [("lora_norm", {"probe_steps": 1}), "lisa"]
    found = profile(make_llama(), samplers=samplers, batches=[make_batch()], cache=False)
    scores = [row["score:lora_norm:probe_steps=1"] for row in found.to_rows()]
    assert all(score > 0 for score in scores) and "score:lisa" not in found.to_rows()[0]
    console = Console(width=120, record=True, file=io.StringIO())
    print_profile(console, found)
    text = console.export_text()
    assert "score" in text and f"{scores[0]:.3g}" in text


@pytest.mark.parametrize(("granularity", "count"), [("block", 8), ("module", 28), ("tensor", 36)])
def test_parts_of_layers_are_measured_and_sampled_as_a_run_has_them(
    granularity: Any, count: int, tmp_path: Path
) -> None:
    model = make_llama()
    samplers: list[Any] = ["lisa", ("owlore", {"metric": "hill"}), ("spectrum", {"choose": "top"})]
    found = profile(
        model, samplers=samplers, granularity=granularity, num_active=3, batches=[make_batch()], cache=False
    )
    scheduler = LayerScheduler(
        model, torch.optim.SGD(model.parameters()), "lisa", granularity=granularity, num_active=3
    )
    rows = found.to_rows()
    assert tuple(row["layer"] for row in rows) == scheduler.layers and len(rows) == count
    assert [row["inclusion:lisa"] for row in rows] == pytest.approx(scheduler.inclusion_probabilities)
    scheduler.close()
    sizes = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    assert sum(row["parameters"] for row in rows) == sizes
    matrices = {
        m.name: m.values["hill"] for m in layer_metrics(model, metrics=("hill",), cache=False).matrices
    }
    own = {row["layer"]: [v for n, v in matrices.items() if n.startswith(row["layer"])] for row in rows}
    for row in rows:
        values = own[row["layer"]]
        if granularity != "block":  # a block is named by a part of it
            assert row["hill"] == (pytest.approx(values[0]) if values else None)
        assert (row["outlier_percent"] is None) == (row["hill"] is None)
    taken = [row["inclusion:spectrum:choose=top"] for row in rows]
    assert sum(taken) == 3 and set(taken) == {0.0, 1.0}
    console = Console(width=120, record=True, file=io.StringIO())
    print_profile(console, found)
    text = console.export_text()
    assert f"{granularity.title()}s: model.layers.*" in text and f"the {granularity}'s probability" in text
    write_profile(tmp_path, found, "tiny")
    assert json.loads((tmp_path / "profile.json").read_text())["granularity"] == granularity
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=f"between 1 and the {count} {granularity}s"):
        profile(model, granularity=granularity, num_active=count + 1)


def test_a_granularity_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="granularity must be one of layer, block, module, tensor"):
        profile(make_llama(), granularity="matrix")  # type: ignore[arg-type]


def test_batches_that_the_model_can_t_run_are_noted() -> None:
    found = profile(make_llama(), batches=[{"pixel_values": torch.zeros(1)}], cache=False)
    assert found.layers[0].outlier_percent is None and found.notes[0].startswith("No outliers: ")
    assert "at least one calibration batch" in profile(make_llama(), batches=[], cache=False).notes[0]


def test_progress_reaches_the_end_of_each_part() -> None:
    seen: list[tuple[str, int, int | None]] = []
    profile(
        make_llama(),
        samplers=SAMPLERS,
        batches=[make_batch(0), make_batch(1)],
        cache=False,
        progress=lambda *args: seen.append(args),
    )
    assert {("spectra", 28, 28), ("outliers", 2, 2), ("samplers", 2, 2)} <= set(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 5}, "num_active must be between 1 and the 4 layers, but got num_active=5"),
        ({"threshold": 0.0}, "threshold must be finite and above 0, but got 0.0"),
        ({"samplers": ("liza",)}, "Did you mean 'lisa'"),
        ({"samplers": [("owlore", {"metrik": 1})]}, "Did you mean 'metric'"),
        ({"layers": "model.nothing"}, "must be the path of a ModuleList"),
        ({"adapter": "/no/such/adapter"}, "An adapter folder must hold"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile(make_llama(), cache=False, **options)


def save_adapter(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():  # what PEFT and transformers say to each other
        warnings.simplefilter("ignore")
        get_peft_model(make_llama(), config).save_pretrained(str(folder))
    return folder


def test_an_adapter_s_norms(tmp_path: Path) -> None:
    folder, model = save_adapter(tmp_path / "adapter"), make_llama()
    found = profile(model, adapter=folder, cache=False)
    norms = lora_norms(folder, model)
    assert [layer.lora_ratio for layer in found.layers] == [norms[layer.name].ratio for layer in found.layers]
    assert all(layer.lora_ratio for layer in found.layers)


def test_files_hold_the_rows(tmp_path: Path) -> None:
    found = profile(make_llama(), samplers=[*SAMPLERS, "owlore"], cache=False)
    rows = found.to_rows()
    assert write_profile(tmp_path, found, "tiny") == ["profile.json", "profile.csv", "profile.png"]
    stored = json.loads((tmp_path / "profile.json").read_text())
    assert stored["layers"] == rows and stored["notes"] == list(found.notes) and stored["environment"]
    with open(tmp_path / "profile.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(row) for row in rows]
    for read, row in zip(table, rows, strict=True):
        assert read == {key: "" if value is None else str(value) for key, value in row.items()}
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "profile.csv",
        "profile.json",
        "profile.png",
    ]


def test_a_picture_of_next_to_nothing(tmp_path: Path) -> None:
    row = dict.fromkeys(("alpha", "hill", "stable_rank", "outlier_percent", "lora_ratio", "probability:x"))
    plot_profile(tmp_path / "profile.png", [{**row, "parameters": 3}] * 2, "nothing")
    assert (tmp_path / "profile.png").stat().st_size > 0


@pytest.mark.parametrize("make", [make_llama, make_t5, make_bert, make_vit])
def test_loads_the_class_that_the_configuration_names(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_any_model(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["NoSuchModel", "models", "AutoConfig"])
def test_another_class_leaves_the_bare_model(name: str, tmp_path: Path) -> None:
    make_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    assert type(load_any_model(str(tmp_path))) is BertModel


@pytest.mark.filterwarnings("ignore")
def test_missing_weights_are_told(tmp_path: Path) -> None:
    make_bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    said: list[str] = []
    load_any_model(str(tmp_path), said.append)
    assert "16 weights aren't in the files" in said[0]


def test_a_folder_whose_weights_are_cut(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_any_model(str(tmp_path))


# The command


def invoke(*arguments: object, columns: int = 200) -> str:
    result = CliRunner().invoke(
        cli.app,
        ["profile", *map(str, arguments)],
        env={"COLUMNS": str(columns), "NO_COLOR": "1"},
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_without_data(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize(*args: object, **kwargs: object) -> None:
        raise AssertionError("no tokenizer is needed")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenize)
    output = invoke(tiny_model)
    assert all(name in output for name in ("lisa", "owlore:metric=alpha"))
    assert "model.layers.*" in output and "alpha" in output
    assert "Note: No outliers: they need calibration data" in output and "outliers\n" not in output


def test_the_command_with_everything(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from layersample import LayerSampler, register\n"
        "@register('first-of-mine')\n"
        "class First(LayerSampler):\n"
        "    'Train the first layer.'\n"
        "    def sample(self, context):\n"
        "        return [0]\n"
        "    def inclusion_probabilities(self, context):\n"
        "        return [1.0, 0.0, 0.0, 0.0]\n"
    )
    output = invoke(
        *(tiny_model, "--data", sums, "--batches", 2, "--max-length", 16, "--threshold", 3),
        *("--adapter", adapter, "--layers", "model.layers", "--plugin", plugin, "--no-cache"),
        *("--sampler", "first-of-mine", "--sampler", "prior:weights=[1,2,3,4],draw=systematic"),
        *("--sampler", "owlore", "--num-active", 1, "--output", tmp_path / "new" / "out"),
    )
    assert "100.00 100.0" in output and "40.00 40.0" in output and "above 3 times" in output
    stored = json.loads((tmp_path / "new" / "out" / "profile.json").read_text())
    rows = stored["layers"]
    assert all(row["outlier_percent"] is not None and row["lora_ratio"] for row in rows)
    assert [row["probability:first-of-mine"] for row in rows] == [1, 0, 0, 0]
    assert sum(row["probability:owlore"] for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("make", [make_t5, make_vit])
def test_the_command_on_other_kinds_of_models(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert "owlore:metric=alpha" in invoke(tmp_path)


def test_the_command_gives_an_encoder_decoder_text_on_both_sides(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    for path in tiny_model.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    make_t5().save_pretrained(tmp_path)
    output = invoke(tmp_path, "--data", sums, "--batches", 1)
    assert "encoder.block.0" in output and "decoder.block.1" in output and "No outliers" not in output


def test_conversations_are_calibration_data_too(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    said = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path.write_text(json.dumps({"messages": said}) + "\n")
    assert "No outliers" not in invoke(tiny_model, "--data", path)


def test_the_table_fits_a_terminal(tiny_model: Path, sums: Path) -> None:
    output = invoke(tiny_model, "--data", sums, "--batches", 1, columns=80)
    assert "…" not in output and sum(line.startswith("3 ") for line in output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "liza"], "Did you mean 'lisa'"),
        (
            ["--sampler", "lisa:draw"],
            "an option of sampler 'lisa' must be given as KEY=VALUE, but got 'draw'",
        ),
        (["--num-active", "9"], "num_active must be between 1 and the 4 layers"),
        (["--layers", "nothing"], "must be the path of a ModuleList"),
        (["--data", "no.jsonl"], "The data file must exist"),
        (["--output", "/proc/nowhere"], "The output folder must be writable"),
    ],
)
def test_the_command_s_errors(tiny_model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke(tiny_model, *arguments)


def test_the_command_names_a_model_that_shares_its_layers(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    AlbertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Each layer must have parameters of its own"):
        invoke(tmp_path)


def test_data_needs_a_tokenizer(sums: Path, tmp_path: Path) -> None:
    make_vit().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must have a tokenizer.* Leave --data out"):
        invoke(tmp_path, "--data", sums)


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    found = profile(load_any_model(str(smollm2)), samplers=[("owlore", {"metric": "alpha"})])
    alphas = [layer.alpha or 0.0 for layer in found.layers]
    assert len(alphas) == 30 and 4 < min(alphas) < max(alphas) < 10
    probabilities = [layer.probabilities[ALPHA] or 0 for layer in found.layers]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities.index(max(probabilities)) == alphas.index(min(alphas))


def test_how_much_is_read_and_how_long_is_said_before(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    with caplog.at_level("INFO", "layersample.progress"):
        profile(make_llama(), cache=False, progress=lambda what, *_: calls.append(caplog.text))
    assert "Spectra of 28 matrices: about 1 s here" in calls[0]


@pytest.mark.parametrize("sampler", ["owlore:metric=outlier", "owlore", "lora_norm", "warmup:sampler=owlore"])
def test_a_sampler_that_needs_data_asks_for_it_at_once(sampler: str, capsys: Any) -> None:
    result = CliRunner().invoke(cli.app, ["profile", "no-such-model", "--sampler", sampler])
    assert isinstance(result.exception, ConfigError)
    assert re.search(r"measures with calibration data: give --data FILE", str(result.exception))
