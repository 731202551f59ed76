"""Input that is malformed, as a user would give it: one message, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layersample.cli import app as cli

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated", "ignore::UserWarning")

Fails = Callable[..., str]
PLUGIN = """
from layersample import LayerSampler, register

@register("mine")
class Mine(LayerSampler):
    '''Mine.'''
    def sample(self, context):
        return [0]
"""


@pytest.fixture
def fails(
    tiny_model: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Fails:
    """Run the command in an empty folder; give its one message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(command: str, *arguments: str, keep: bool = False) -> str:
        usual = {
            "train": [
                "--model",
                str(tiny_model),
                "--data",
                str(sums),
                "--max-length",
                "16",
                "--output",
                "out",
            ],
            "plan": [],
            "profile": [],
            "benchmark": ["--output", "out"],
            "list": [],
        }[command]
        before = {p.name for p in tmp_path.iterdir()}
        # What is given comes last, and so wins.
        monkeypatch.setattr("sys.argv", ["layersample", command, *usual, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        said = capsys.readouterr()
        assert exit.value.code == 2, said
        assert "Traceback" not in said.err + said.out
        # Python keeps what it has compiled of a plug-in beside it, where the user lets it.
        left = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}
        assert left == before, "something is left behind"
        return said.err

    return run


def expect(pattern: str, said: str) -> None:
    assert re.search(pattern, " ".join(said.split())), said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save_steps: 2024-13-45", "run.yaml: save_steps: .* but got '2024-13-45'"),
        ("steps: 0x_", "run.yaml, line 1: .*'0x_' can't be read as a whole number"),
        ("steps: !!int abc", "run.yaml, line 1: .*'abc' can't be read"),
        ("warmup: !!float abc", "run.yaml, line 1: .*'abc' can't be read"),
        ("sampler_options: " + "[" * 2000, "run.yaml, line 1: .*more than 50 levels"),
        ("model:", "run.yaml: model: .* but got None"),
        ("steps: 3\nsteps: 4", "run.yaml, line 2: .* 'steps' comes twice"),
        ('output: "a\\0b"', "run.yaml, line 1: .* NUL"),
        ('model: "a\\0b"', "run.yaml, line 1: .* NUL"),
        ("output: [a, b]", "run.yaml: output: Input should be a path"),
        ("model: !!binary aGVsbG8=", "run.yaml, line 1: .*!!binary"),
        ('model: "\\ud800"', "run.yaml, line 1: .*half of a character"),
        ("steps: true", "run.yaml: steps: Input should not be true or false, but got True"),
        ("steps: 4.0", "run.yaml: steps: .*fractional part, but got 4.0"),
        ("learning_rate: .nan", "run.yaml: learning_rate: .*finite number"),
        ("learning_rate: 1e99", "run.yaml: learning_rate: .*less than or equal"),
        ("[steps, 3]", "must hold a mapping"),
        ("steps: *nowhere", "run.yaml, line 1: .*undefined alias"),
    ],
)
def test_files_of_options(fails: Fails, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    expect(message, fails("train", "--config", "run.yaml"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--steps", "99999999999999999999999", "steps: .*less than or equal to 1000000000"),
        ("--seed", "4294967296", "seed: .*less than .*but got 4294967296"),
        ("--seed", "1180591620717411303424", "seed: "),
        ("--seed", "-1", "seed: "),
        ("--warmup", "inf", "warmup: .*finite number"),
        ("--epochs", "inf", "epochs: .*finite number"),
        ("--epochs", "nan", "epochs: .*finite number"),
        ("--learning-rate", "inf", "learning_rate: .*finite number"),
        ("--clip", "nan", "clip: .*finite number"),
        ("--batch-size", "99999999999999999999", "batch_size: "),
        ("--gradient-accumulation", "99999999999999999999", "gradient_accumulation: "),
        ("--period", "99999999999999999999", "period: "),
        ("--save-steps", "99999999999999999999", "save_steps: "),
        ("--sampler-option", "draw=2024-13-45", "draw.*'2024-13-45'"),
        ("--sampler-option", "draw=!!int abc", "value of draw.*'abc' can't be read"),
        ("--sampler-option", "draw=[[", "the value of draw: must be YAML"),
        ("--projection-option", "rank=!!float x", "value of rank.*'x' can't be read"),
    ],
)
def test_flags(fails: Fails, flag: str, value: str, message: str) -> None:
    expect(message, fails("train", flag, value))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("max_steps=abc", "max_steps must be left out, .* option for it is steps"),
        ("max_steps=3", "max_steps must be left out, .* option for it is steps"),
        ("num_train_epochs=3", "num_train_epochs must be left out, .* option for it is epochs"),
        ("learning_rate=1", "learning_rate must be left out"),
        ("max_grad_norm=abc", "max_grad_norm must be left out, .* option for it is clip"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size must be left out"),
        ("resume_from_checkpoint=x", "resume_from_checkpoint must be left out, .* option for it is resume"),
        ("dataset_num_proc=-1", "dataset_num_proc must be at least 1.*but got -1"),
        ("per_device_eval_batch_size=0", "per_device_eval_batch_size must be at least 1.*but got 0"),
        ("dataloader_num_workers=-2", "dataloader_num_workers must be at least 0.*but got -2"),
        ("data_seed=1.5", "data_seed: .*but got 1.5"),
        ("data_seed=true", "data_seed: .*but got True"),
        ("adam_beta1=.nan", "adam_beta1: .*finite number"),
        ("adam_beta1=2", "Invalid beta parameter"),
        ("report_to=nonsense", "nonsense is not supported"),
        ("lr_scheduler_kwargs={a: 1}", "don't go together: .*unexpected keyword argument 'a'"),
        ("lr_scheduler_kwargs=abc", "trainer|go together"),
        ("torch_compile=maybe", "torch_compile: .*true or false, not text, but got 'maybe'"),
        ("torch_compile_backend=nonsense", "torch_compile_backend 'nonsense' is none of torch's"),
        ("deepspeed=x.json", "deepspeed must be left out, .*--shard fsdp2 shards as ZeRO-3 does"),
        ("fsdp=full_shard", "fsdp must be left out, .*by --shard fsdp2"),
        ("loss_type=nonsense", "loss_type must be 'nll' or 'dft'"),
        ("eval_strategy=often", "often is not a valid IntervalStrategy"),
        ("eval_strategi=steps", "Unknown option of SFTConfig 'eval_strategi'. Did you mean 'eval_strategy'"),
        ("optim=adamm", "adamm is not a valid OptimizerNames"),
        ("logging_steps=-1", "logging_steps must be at least 0"),
        ("eval_accumulation_steps=0", "eval_accumulation_steps must be at least 1.*but got 0"),
        ("dataloader_prefetch_factor=0", "dataloader_prefetch_factor must be at least 1.*but got 0"),
        ("pad_to_multiple_of=0", "pad_to_multiple_of must be at least 1.*but got 0"),
        (
            "dataloader_persistent_workers=true",
            "don't go together: persistent_workers option needs num_workers > 0",
        ),
        # What the Trainer's constructor finds, which has the model and its tokenizer.
        (
            "eos_token=<nope>",
            "train this model on this data with eos_token='<nope>', but: .*not found in the voc",
        ),
        ("chat_template_path=/nope", "with chat_template_path='/nope', but: "),
        ("padding_free=true", "with padding_free=True, but: .*Either enable packing"),
        ("label_smoothing_factor=1.5", "label_smoothing_factor must be between 0 and 1, but got 1.5"),
        ("eval_on_start=true", "eval_on_start must be left out, .*before the first step of every run"),
        ("packing=[1]", "packing: .*valid boolean"),
        ("optim_args=3", "optim_args: .*valid string"),
        ("accelerator_config={a: 1}", "don't go together"),
        ("dataloader_drop_last=true", "dataloader_drop_last must be left out, .*drop held-out examples"),
        ("do_train=false", "do_train must be left out, .*in any case"),
        ("label_names=[a]", "label_names must be left out"),
        ("push_to_hub=true", "push_to_hub must be left out, .*--push-to-hub"),
    ],
)
def test_options_of_the_trainer(fails: Fails, pair: str, message: str) -> None:
    expect(message, fails("train", "--trainer-option", pair))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLUGIN + "import sys\nsys.exit(0)\n", r"p.py, line 10, called sys.exit\(0\)"),
        (PLUGIN + "raise SystemExit\n", r"p.py, line 9, called sys.exit\(None\)"),
        (PLUGIN + "raise KeyError('x')\n", "p.py, line 9, raised KeyError: 'x'"),
        (
            PLUGIN + PLUGIN.replace("Mine(", "Other("),
            "p.py, line 1[0-9], raised ValueError: .*'mine' is taken",
        ),
        ("x = (", "p.py, line 1, raised SyntaxError"),
        ("import pytest\npytest.skip('no', allow_module_level=True)", "p.py, line 2, raised Skipped: no"),
        ("def f(): f()\nf()", "p.py, line 1, raised RecursionError"),
        ("\0", "p.py, line .*, raised"),
    ],
)
@pytest.mark.parametrize("command", ["train", "list"])
def test_plug_ins(fails: Fails, tmp_path: Path, text: str, message: str, command: str) -> None:
    (tmp_path / "p.py").write_text(text)
    expect(message, fails(command, "--plugin", "p.py"))


def test_outputs(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("not-there")
    (tmp_path / "file").write_text("")
    for output, message in (
        ("x" * 5000, "output folder must be writable, but for 'xxx.*: a name has at most 255 bytes"),
        ("loop", "'loop': .*circle"),
        ("loop/inside", "'loop/inside'"),
        ("nowhere", "'nowhere': it is a link to nowhere"),
        ("file", "must be a folder, but file is a file"),
        ("file/inside", "'file/inside': .*file is a file"),
        ("/proc/x", "output folder must be writable"),
    ):
        expect(message, fails("train", "--output", output))
    (tmp_path / "config.yaml").write_text("steps: 3")
    for here in (".", "..", str(tmp_path)):
        expect(
            "--overwrite must replace a folder beside the work|no config.yaml",
            fails("train", "--output", here, "--overwrite"),
        )
    for command in (["profile", "m"], ["benchmark"]):
        expect("output folder must be writable", fails(*command, "--output", "x" * 5000))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("/nope/x.png", "picture must lie in a folder that exists, but there is no '/nope'"),
        ("x" * 300, "picture must be writable, .*255 bytes"),
        (".", "picture must be a file, but '.' is a folder"),
    ],
)
def test_pictures(fails: Fails, picture: str, message: str) -> None:
    expect(message, fails("plan", "gpt2", "--picture", picture))


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    content: dict[str, Any] = json.loads(config.read_text())
    if how == "header":
        weights.write_bytes(weights.read_bytes()[:5])
    elif how == "end":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "sizes":
        config.write_text(json.dumps({**content, "intermediate_size": 64}))
    elif how == "list":
        config.write_text("[1, 2]")
    elif how == "deep":
        config.write_text("[" * 100_000)
    elif how == "no json":
        config.write_text("{")
    elif how == "heads":
        config.write_text(json.dumps({**content, "num_attention_heads": 3, "num_key_value_heads": 3}))
    elif how == "type":
        config.write_text(json.dumps({**content, "vocab_size": "abc"}))
    elif how == "kind":
        config.write_text(json.dumps({**content, "model_type": "nonsense"}))
    elif how == "pickle":
        weights.unlink()
        torch.save({"x": Path}, folder / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "adapter":
        config.rename(folder / "adapter_config.json")
    elif how == "gguf":
        config.rename(folder / "model.gguf")


MODELS = [
    ("header", "'m' could not be loaded: .*header"),
    ("end", "'m' could not be loaded: "),
    ("sizes", r"the shapes that its config.json gives, but .* is \[32, 16\] in the files and \[64, 16\]"),
    ("list", "m/config.json: must hold a mapping, but holds a list"),
    ("deep", "m/config.json: must be JSON"),
    ("no json", "m/config.json: must be JSON"),
    ("heads", "hidden size .16. is not a multiple of the number of attention heads .3."),
    ("type", "'m' could not be loaded: .*vocab_size"),
    ("kind", "'m' could not be loaded: .*nonsense"),
    ("pickle", "a pickle that isn't opened, because it holds more than tensors"),
    ("no weights", "model 'm' must hold weights .*, but its folder holds"),
    ("empty", "must be a folder with config.json or a .gguf file, but it holds none"),
    ("adapter", "must be a whole model, but the folder holds an adapter. Merge it"),
    ("gguf", "'m' could not be loaded: "),
]


@pytest.mark.parametrize(("how", "message"), MODELS)
@pytest.mark.parametrize("command", ["train", "profile"])
def test_folders_of_models(
    fails: Fails, tiny_model: Path, tmp_path: Path, how: str, message: str, command: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    damage(tmp_path / "m", how)
    expect(message, fails(command, *(["m"] if command == "profile" else ["--model", "./m", "--model", "m"])))


@pytest.mark.parametrize(
    ("how", "message"), [m for m in MODELS if m[0] in ("heads", "type", "list", "kind", "deep")]
)
def test_plans_of_damaged_folders(
    fails: Fails, tiny_model: Path, tmp_path: Path, how: str, message: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    damage(tmp_path / "m", how)
    expect(message, fails("plan", "m"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "Unknown model './nope'. .*A folder, a .gguf file or a hub id"),
        ("nope/", "Unknown model 'nope/'"),
        ("~/no/such/model", "Unknown model"),
        ("~nobody-here/x", "Unknown model|must be a folder or a hub id"),
        ("x" * 5000, "Unknown model|must be a folder or a hub id"),
    ],
)
def test_names_of_models(fails: Fails, name: str, message: str) -> None:
    expect(message, fails("train", "--model", name))


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "gpt2", "--batch", "99999999999999999999"],
        ["plan", "gpt2", "--gpus", "99999999999999999999"],
        ["profile", "m", "--max-length", "99999999999999999999"],
        ["profile", "m", "--batches", "99999999999999999999"],
        ["profile", "m", "--num-active", "99999999999999999999"],
        ["profile", "m", "--sampler", "lisa:draw=!!int x"],
        ["profile", "m", "--threshold", "nan"],
        ["profile", "m", "--threshold", "-1"],
        ["benchmark", "--set", "test_size=2024-13-45"],
        ["benchmark", "--set", "test_size=99999999999999999999"],
        ["benchmark", "--option", "period=!!int x"],
        ["benchmark", "--seeds", "4294967296,1"],
        ["benchmark", "--steps", "99999999999999999999"],
    ],
)
def test_other_commands(fails: Fails, arguments: list[str]) -> None:
    said = re.sub(r"[^\w.'-]", "", fails(*arguments))  # typer breaks lines within a frame
    assert re.search(r"99999999999999999999|2024-13-45|'x'|4294967296|Invalidvaluefor'--", said), said


def test_suites(fails: Fails, tmp_path: Path) -> None:
    for text, message in (
        ("test_size: 2024-13-45", "s.yaml: test_size: .* but got '2024-13-45'"),
        ("test_size: !!int x", "s.yaml, line 1"),
        ("seeds: [true]", r"s.yaml: seeds: .*true or false, but got \[True\]"),
        ("methods: [{name: lisa, name: full}]", "s.yaml, line 1: .*'name' comes twice"),
        ("methods: [{nam: lisa}]", r"s.yaml: methods.0.nam"),
        ("confidence: .nan", "s.yaml: confidence: "),
    ):
        (tmp_path / "s.yaml").write_text(text)
        expect(message, fails("benchmark", "--suite", "s.yaml"))
