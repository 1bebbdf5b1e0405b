"""The task causal_lm: tiny models of transformers, trained, grown, stopped and resumed."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_engine import TaskSpec, read_sample
from moe_engine.cli import main
from moe_engine.plugins.tasks.causal_lm import CausalLM, TextPerplexity
from moe_engine.run.config import RunConfig
from moe_engine.run.folder import old_folder
from moe_engine.run.training import Stopped, Training
from moe_engine.testing import tiny_checkpoint
from support import on_ranks, refused

pytest.importorskip("transformers")

PLAY = Path(__file__).parents[2] / "plugins" / "tasks" / "comedy_of_errors.txt"
SMALL = {"task": "causal_lm", "steps": 12, "batch_size": 8, "log_every": 6, "no_plugin": ("plots", "html")}
GROWS = ("switch_aux", "schedule", "clone")
LLAMA = {"upcycle": 4, "layers": "all"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with tiny checkpoints, and two texts."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("mixtral", "qwen3_moe", "deepseek_v3"):
        tiny_checkpoint(folder / name, name, num_hidden_layers=2)
    tiny_checkpoint(folder / "llama", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    play = PLAY.read_text("utf-8")
    (folder / "lower.txt").write_text(play[:3000].lower(), "utf-8")
    (folder / "upper.txt").write_text(play[3000:5000].upper(), "utf-8")
    return folder


def training(models, out, name="mixtral", plugins=("switch_aux",), options=None, settings=None, **more):
    texts = ",".join(str(models / text) for text in ("lower.txt", "upper.txt"))
    given = {"model": str(models / name), "file": texts, "length": 16, **(options or {})}
    return Training(RunConfig(plugins=plugins, **{**SMALL, **more}), {"causal_lm": given, **(settings or {})}, out)


@pytest.mark.parametrize(("name", "options"), [("mixtral", {}), ("qwen3_moe", {}), ("llama", LLAMA)])
def test_a_model_learns_and_is_measured_by_text(models, tmp_path, name, options):
    """Perplexity falls below that of 256 equally likely bytes; that of all windows is the mean over both texts."""
    run = training(models, tmp_path / "run", name, options=options, lr=0.003).run()
    measured = run.summary["measures"]
    assert list(measured) == ["perplexity.lower", "perplexity.upper"]
    assert run.summary["perplexity"] < 220
    windows = [299 // 16, 199 // 16]
    means = [windows[0] * math.log(measured["perplexity.lower"]), windows[1] * math.log(measured["perplexity.upper"])]
    assert sum(means) / sum(windows) == pytest.approx(run.summary["loss"], rel=1e-5)
    sample = read_sample(run.folder)
    assert [len(layer.expert) for layer in sample.layers] == [sum(windows)] * 2
    test_text = (models / "lower.txt").read_text("utf-8")[-300:]
    assert sample.rows[0] == 0 and "".join(sample.texts[0]) == test_text[:16]
    assert sample.layers[0].expert.shape == (sum(windows), 16, 2)
    experts = options.get("upcycle", 8)
    assert [layer["experts"] for layer in run.summary["layers"]] == [experts] * 2
    assert run.config["run"]["experts"] == experts


def test_the_perplexity_of_a_text_is_exp_of_its_mean_loss():
    metric = TextPerplexity(["a", "b"])
    metric.update(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 1, 0]))
    metric.update(torch.tensor([3.0]), torch.tensor([1]))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx({"perplexity.a": math.exp(3), "perplexity.b": math.exp(2.5)})


def test_the_last_tenth_of_each_text_is_for_testing(models, tmp_path):
    (tmp_path / "t.txt").write_text("".join(chr(33 + i % 90) for i in range(200)), "utf-8")
    task = CausalLM(model=str(models / "mixtral"), file="t.txt", length=8, stride=4).moe_task(
        TaskSpec(data_dir=str(tmp_path))
    )
    (train, train_text), (test, test_text) = task.train, task.test
    assert [tuple(train.shape), tuple(test.shape)] == [(1 + (180 - 9) // 4, 9), (2, 9)]
    assert torch.equal(test[0, 8:], test[1, :1])  # the last target of a window is the first input of the next
    assert not train_text.any() and not test_text.any() and task.measures is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {}),
        ("deepseek_v3", {"train": "moe", "gradient_checkpointing": True}),
        ("llama", LLAMA),
        ("mixtral", {"train": "moe", "lora": 2}),
    ],
    ids=["adopted", "recipe", "upcycled", "lora"],
)
def test_a_stopped_run_resumes_to_the_same_bits(models, tmp_path, name, options):
    """Through a growth before the stop and one after it."""
    if "lora" in options:
        pytest.importorskip("peft")
    every = {"schedule": {"every": 4}}
    straight = training(models, tmp_path / "straight", name, GROWS, options, every).run()
    cut = training(models, tmp_path / "cut", name, GROWS, options, every)
    cut.listener = lambda record: setattr(cut, "stop", record["step"] >= 6)
    with pytest.raises(Stopped):
        cut.run()
    config, settings = old_folder(tmp_path / "cut")
    again = Training(config, settings, tmp_path / "cut", resumed=True).run()
    assert again.records == straight.records
    assert len(straight.summary["growths"]) == 2 * len(straight.summary["layers"])
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("straight", "cut")]
    assert weights[0] == weights[1]


def trained(run):
    """The names of weights that a run trains."""
    return Counter(
        name.rpartition(".mlp.")[2] if ".mlp." in name else "other"
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    )


def test_only_what_is_named_is_trained(models, tmp_path):
    whole = trained(training(models, tmp_path / "all"))
    moe = trained(training(models, tmp_path / "moe", options={"train": "moe"}))
    router = trained(training(models, tmp_path / "router", options={"train": "router"}))
    assert whole["other"] > 10
    assert moe == {"experts.gate_up_proj": 2, "experts.down_proj": 2, "gate.weight": 2}
    assert router == {"gate.weight": 2}


def test_adapters_need_peft(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused("not-installed", "pip install peft"):
        training(models, tmp_path / "run", options={"lora": 2, "train": "moe"})


REFUSALS = {
    "no model": ("mix-refused", ["causal_lm.model"], {"model": None}),
    "no text": ("mix-refused", ["causal_lm.file"], {"file": None}),
    "lora of all": ("mix-refused", ["causal_lm.lora", "causal_lm.train"], {"lora": 2}),
    "no folder": ("no-checkpoint", ["nowhere"], {"model": "nowhere"}),
    "dense": ("dense-model", ["llama", "causal_lm.upcycle"], {"model": "llama"}),
    "a mixture upcycled": ("already-a-mixture", ["causal_lm.upcycle"], {"upcycle": 4}),
    "pickled": ("pickled-checkpoint", ["safetensors"], {"model": "pickled"}),
    "foreign tokenizer": ("wrong-tokenizer", ["300 tokens", "256"], {"model": "foreign"}),
    "quantised": ("quantised-checkpoint", ["gptq"], {"model": "quantised"}),
    "an encoder": ("not-a-language-model", ["clip"], {"model": "other"}),
    "not a text": ("not-a-text", ["bytes.txt"], {"file": "bytes.txt"}),
    "short": ("text-too-short", ["causal_lm.length=250", "name a longer text"], {"length": 250}),
    "long": ("window-too-long", ["300", "256"], {"length": 300}),
    "same name": ("duplicate-text", ["lower"], {"file": "lower.txt,lower.txt"}),
    "no file": ("missing-file", ["none.txt"], {"file": "none.txt"}),
}


@pytest.fixture(scope="module")
def broken(models):
    """Folders like mixtral's, each with a fault."""
    files = {path.name: path.read_bytes() for path in (models / "mixtral").iterdir()}
    config, tokenizer = json.loads(files["config.json"]), json.loads(files["tokenizer.json"])
    tokenizer["model"]["vocab"] |= {f"token {index}": 256 + index for index in range(44)}
    faults = {
        "pickled": {"model.safetensors": None, "pytorch_model.bin": b"\x80"},
        "foreign": {"tokenizer.json": json.dumps(tokenizer).encode()},
        "quantised": {"config.json": json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}).encode()},
        "other": {"config.json": b'{"model_type": "clip"}'},
    }
    for name, changed in faults.items():
        (models / name).mkdir()
        for file, content in {**files, **changed}.items():
            if content is not None:
                (models / name / file).write_bytes(content)
    (models / "bytes.txt").write_bytes(b"ab\xff" * 500)
    return models


@pytest.mark.parametrize(("code", "words", "options"), REFUSALS.values(), ids=REFUSALS)
def test_what_can_not_be_trained_is_refused(broken, tmp_path, monkeypatch, code, words, options):
    monkeypatch.chdir(broken)
    options = {"file": "lower.txt,upper.txt", "model": "mixtral", **options}
    with refused(code, *words):
        training(broken, tmp_path / "run", options=options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flag", "value"), [("experts", 4), ("top_k", 1)])
def test_a_size_that_the_model_does_not_have_is_refused(models, tmp_path, flag, value):
    with refused("sizes-of-model", f"--{flag.replace('_', '-')} {value}"):
        training(models, tmp_path / "run", **{flag: value})
    assert training(models, tmp_path / "run", experts=8, top_k=2).config.experts == 8


def test_a_dense_engine_is_refused(models, tmp_path):
    with refused("adopt-dense", "dense"):
        training(models, tmp_path / "run", plugins=(), dense=True)


def test_too_large_a_batch_is_refused_with_advice(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--set", f"causal_lm.model={models / 'mixtral'}", "--set", f"causal_lm.file={models / 'lower.txt'}"]
    code = main(["run", "--task", "causal_lm", *words, "--set", "causal_lm.length=16", "--batch-size", "100000000"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert "GB free" in err and "--batch-size" in err and "gradient_checkpointing" in err


SHARDED = {"mixtral": ("mixtral", {}, GROWS), "upcycled": ("llama", LLAMA, GROWS[:1])}


def _sharded(rank, folder, models):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case, given in SHARDED.items():
        few_steps(models, Path(folder) / f"{case}-both", *given, parallel="shard")
    torch.distributed.destroy_process_group()


def few_steps(models, out, name, options, plugins, **more):
    settings = {"schedule": {"every": 2}} if "schedule" in plugins else {}
    return training(models, out, name, plugins, options, settings, steps=4, **more).run()


def test_a_model_whose_weights_are_cut_over_ranks_trains_grows_and_is_measured_as_in_one_process(models, tmp_path):
    """Borrowed weights are the block's, which fully_shard cuts with the block; copies may be transposed."""
    on_ranks(_sharded, str(tmp_path), models)
    for case, given in SHARDED.items():
        one = few_steps(models, tmp_path / f"{case}-alone", *given).summary
        two = json.loads((tmp_path / f"{case}-both" / "summary.json").read_text())
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)  # in fp32, a choice may fall the other way
        assert two["sizes"] == one["sizes"]
        assert len(two["growths"]) == len(one["growths"]) == (len(one["layers"]) if case == "mixtral" else 0)
        samples = [read_sample(tmp_path / f"{case}-{how}") for how in ("alone", "both")]
        for mine, theirs in zip(*(sample.layers for sample in samples), strict=True):
            torch.testing.assert_close(mine.cka, theirs.cka, rtol=0, atol=0.02)
