"""`evaluate`, `generate` and `export`, on runs of causal_lm and on folders of transformers."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_engine.testing import tiny_checkpoint
from sentences import check

transformers = pytest.importorskip("transformers")

PLAY = Path(__file__).parents[2] / "plugins" / "tasks" / "comedy_of_errors.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, two texts, and runs: a grown mixture, one with a bias, and the digits."""
    from moe_engine.run.config import RunConfig
    from moe_engine.run.training import Training

    place = tmp_path_factory.mktemp("language")
    for name in ("mixtral", "llama"):
        tiny_checkpoint(place / name, name, num_hidden_layers=2)
    play = PLAY.read_text("utf-8")
    (place / "a.txt").write_text(play[:1500], "utf-8")
    (place / "b.txt").write_text(play[1500:2600].upper(), "utf-8")
    given = {"model": str(place / "mixtral"), "file": str(place / "a.txt"), "length": 16}
    small = {"task": "causal_lm", "steps": 6, "batch_size": 8, "checkpoint_every": 3, "no_plugin": ("plots", "html")}
    settings = {"causal_lm": given, "schedule": {"every": 4}}
    Training(RunConfig(plugins=("switch_aux", "schedule"), **small), settings, place / "grown").run()
    biased = RunConfig(plugins=("saturation",), **small)
    Training(biased, {"causal_lm": given}, place / "biased").run()
    digits = {"task": "blobs", "epochs": 1, "no_plugin": ("plots", "html")}
    Training(RunConfig(**digits), {"blobs": {"images": 100, "test_images": 20}}, place / "blobs").run()
    return place


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def contents(place):
    return {path: sha256(path.read_bytes()).hexdigest() for path in sorted(place.rglob("*")) if path.is_file()}


def plain_loss(model, text, length):
    """The mean over all tokens but the first, one window after another."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("mixtral")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    total = 0.0
    for start in range(0, ids.shape[1] - 1, length):
        window = ids[:, start : start + length + 1]
        with torch.no_grad():
            total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    return total / (ids.shape[1] - 1)


def test_evaluate_gives_the_loss_of_a_plain_loop(here, call):
    code, out, _ = call("evaluate", "mixtral", "--text", "a.txt", "b.txt", "--length", "100", "--json")
    report = json.loads(out)
    model = transformers.AutoModelForCausalLM.from_pretrained("mixtral").eval()
    expected = [plain_loss(model, Path(name).read_text("utf-8"), 100) for name in ("a.txt", "b.txt")]
    assert (code, [row["loss"] for row in report["texts"]]) == (0, pytest.approx(expected, rel=1e-5))
    tokens = [row["tokens"] for row in report["texts"]]
    mean = sum(a * b for a, b in zip(expected, tokens, strict=True)) / sum(tokens)
    assert report["loss"] == pytest.approx(mean, rel=1e-5)
    assert [row["layer"] for row in report["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(row["experts"] == 8 and row["cv"] >= 0 and row["maxvio"] > 0 for row in report["layers"])


def test_a_run_is_evaluated_by_its_newest_intact_checkpoint_and_left_alone(here, call, tmp_path):
    """A damaged one is told, and neither renamed nor used."""
    shutil.copytree("grown", tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-4])
    before = contents(tmp_path / "run")
    code, out, err = call("evaluate", tmp_path / "run", "--text", "a.txt", "--json")
    assert (code, contents(tmp_path / "run")) == (0, before)
    assert "is damaged" in err
    assert [row["experts"] for row in json.loads(out)["layers"]] == [8, 8]  # it grew later
    code, out, err = call("evaluate", "grown", "--text", "a.txt", "b.txt")
    assert (code, err) == (0, "")
    assert "all texts" in out and "maxvio" in out


def test_what_is_exported_evaluates_as_its_run(here, call, tmp_path):
    before = contents(here / "grown")
    code, out, _ = call("export", "grown", tmp_path / "model", "--json")
    assert (code, json.loads(out)["experts"], contents(here / "grown")) == (0, 9, before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.num_local_experts == 9
    losses = [
        json.loads(call("evaluate", one, "--text", "a.txt", "--length", "64", "--json")[1])["loss"]
        for one in ("grown", tmp_path / "model")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_same_seed_writes_the_same_text(here, call):
    def written(*words):
        code, out, err = call("generate", "grown", "--prompt", "To be", "--tokens", "12", *words)
        assert (code, err) == (0, "")
        return out

    drawn = [written("--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert written() == written("--seed", "5")
    assert written().startswith("To be")


def test_a_dense_model_has_a_loss_and_no_balance(here, call):
    code, out, _ = call("evaluate", "llama", "--text", "a.txt")
    assert code == 0 and "the model has no experts" in out


REFUSED = {
    "another task": (["evaluate", "blobs", "--text", "a.txt"], "not-a-language-model", ["blobs"]),
    "another task exported": (["export", "blobs", "out"], "not-a-language-model", ["blobs"]),
    "neither": (["generate", ".", "--prompt", "a"], "not-a-model", ["config.toml", "config.json"]),
    "nothing": (["generate", "nowhere", "--prompt", "a"], "no-checkpoint", ["nowhere"]),
    "no prompt": (["generate", "mixtral", "--prompt", ""], "empty-prompt", ["prompt"]),
    "taken": (["export", "grown", "llama"], "folder-exists", ["llama"]),
    "a bias without a place": (["export", "biased", "out"], "not-exportable", ["saturation"]),
    "no text": (["evaluate", "mixtral", "--text", "none.txt"], "unreadable-file", ["none.txt"]),
}


@pytest.mark.parametrize(("words", "code", "named"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_done_is_one_sentence(here, refusal, words, code, named):
    check(refusal(*words), *named, code=code)


def test_a_run_without_a_checkpoint_says_when_one_comes(here, refusal, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy("grown/config.toml", tmp_path / "run")
    check(refusal("export", tmp_path / "run", "out"), "--checkpoint-every", code="no-run-checkpoint")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "huge"])
def test_weights_that_were_damaged_give_no_number(here, refusal, tmp_path, value):
    """Whether a weight is not finite itself, or what is computed from it is not."""
    shutil.copytree("mixtral", tmp_path / "mixtral")
    weights = load_file(tmp_path / "mixtral" / "model.safetensors")
    weights["model.norm.weight"].fill_(value)
    save_file(weights, tmp_path / "mixtral" / "model.safetensors", {"format": "pt"})
    place = str(tmp_path / "mixtral")
    for words in (
        ["evaluate", place, "--text", "a.txt", "--length", "16", "--json"],
        ["generate", place, "--prompt", "To be", "--tokens", "2"],
        ["inspect", place, "--text", "a.txt", "--length", "16", "--json"],
    ):
        check(refusal(*words), "not finite", code="damaged-checkpoint")
