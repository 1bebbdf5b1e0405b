"""The task `lm`: windows, split, causality, what it learns, and what it refuses."""

from collections import Counter
from math import exp, log
from pathlib import Path

import pytest
import torch

from moe_engine import Engine, TaskSpec
from moe_engine.cli import main
from moe_engine.plugins.tasks.lm import Lm
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from support import refused

PLAY = Path(__file__).parents[2] / "plugins" / "tasks" / "comedy_of_errors.txt"


def task_of(tmp_path, text, **options):
    (tmp_path / "text.txt").write_bytes(text.encode())
    return Lm(file="text.txt", **options).moe_task(TaskSpec(str(tmp_path)))


def test_the_embedded_play_is_plain_text():
    text = PLAY.read_text("ascii")
    assert (len(text), len(set(text))) == (84733, 61)
    assert text.startswith("THE COMEDY OF ERRORS\n\nAEGEON:\nProceed, Solinus, to procure my fall\n")
    assert text.endswith("And now let's go hand in hand, not one before another.\n")


def test_windows_of_both_halves_by_hand(tmp_path):
    """30 characters, windows of 2 and the next one: 27 are for training, at every place, the other 3 for testing."""
    text = "abcdefghijklmnopqrstuvwxyzABCD"
    task = task_of(tmp_path, text, length=2)
    ids = {letter: index for index, letter in enumerate(sorted(text))}  # capitals come first
    expected = [[ids[letter] for letter in text[start : start + 3]] for start in range(25)]
    assert expected == task.train[0].tolist()
    assert [[ids["B"], ids["C"], ids["D"]]] == task.test[0].tolist()


def test_test_windows_predict_each_character_once_and_training_ones_step_by_an_eighth(tmp_path):
    """520 characters: 468 and 52; with windows of 16, (468 - 17) // 2 + 1 = 226 and (52 - 17) // 16 + 1 = 3."""
    task = task_of(tmp_path, "".join(chr(256 + index) for index in range(520)), length=16)
    assert [tuple(task.train[0].shape), tuple(task.test[0].shape)] == [(226, 17), (3, 17)]
    assert task.train[0][:3, 0].tolist() == [0, 2, 4]
    assert list(range(469, 469 + 48)) == task.test[0][:, 1:].flatten().tolist()
    assert int(task.train[0].max()) < int(task.test[0].min())  # no window lies across the cut


def test_a_character_that_only_the_test_set_has_is_known(tmp_path):
    task = task_of(tmp_path, "ab" * 90 + "\N{SNOWMAN}" * 20, length=4)
    engine = Engine("topk", experts=2)
    model = task.model(engine).eval()
    assert torch.isfinite(task.score(model, task.test)["loss"])
    assert [engine.layers[0].spec.vocab, engine.layers[0].spec.causal] == [3, True]


@pytest.mark.parametrize(
    ("layers", "every", "sparse"), [(2, 2, [1]), (3, 2, [1]), (4, 2, [1, 3]), (2, 1, [0, 1]), (7, 3, [2, 5])]
)
def test_every_second_block_has_a_layer_of_experts_that_is_given_ids(layers, every, sparse):
    engine = Engine("topk", experts=2)
    model = Lm(layers=layers, every=every).moe_task(TaskSpec()).model(engine)
    assert [f"blocks.{index}.feed" for index in sparse] == [layer.name for layer in engine.attach(model).layers]
    seen = []
    for layer in engine.layers:
        layer.register_forward_pre_hook(lambda layer, args, kwargs: seen.append(kwargs["ids"]), with_kwargs=True)
    ids = torch.randint(61, (3, 5))
    model(ids)
    assert len(sparse) == len(seen)
    assert all(torch.equal(ids, got) for got in seen)


def test_a_later_character_changes_no_earlier_logits():
    """In float64, so that another number of rows of an expert shows in the sixteenth digit only."""
    model = Lm(layers=4, length=12).moe_task(TaskSpec()).model(Engine("topk", experts=4)).double().eval()
    ids = torch.randint(61, (2, 12))
    other = ids.clone()
    other[:, 7] = (ids[:, 7] + 1) % 61
    before, after = model(ids), model(other)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-12)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-6  # places 7 to 11 all see place 7


def test_the_score_is_the_mean_cross_entropy_of_the_next_character():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    window = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 1]])
    score = Lm().moe_task(TaskSpec()).score(lambda ids: logits if ids.shape == (2, 3) else None, (window,))
    surprises = [-logits[b, s].log_softmax(-1)[window[b, s + 1]] for b in range(2) for s in range(3)]
    assert list(score) == ["loss"]
    assert sum(surprises) / 6 == pytest.approx(float(score["loss"]), rel=1e-12)


def unigram_perplexity():
    """Of the last tenth of the play, by the frequencies of the rest."""
    text = PLAY.read_text("ascii")
    cut = len(text) - len(text) // 10
    counts = Counter(text[:cut])
    return exp(-sum(log(counts[letter] / cut) for letter in text[cut:]) / len(text[cut:]))


@pytest.mark.parametrize(("steps", "limit"), [(30, 25), pytest.param(None, 10, marks=pytest.mark.long)])
def test_one_epoch_ends_far_below_the_unigram_perplexity(tmp_path, steps, limit):
    """29.9 by frequencies alone; 10.1 would take the letter before (bigrams): one epoch comes below that too."""
    assert unigram_perplexity() == pytest.approx(29.9, abs=0.1)
    config = RunConfig(task="lm", epochs=1, steps=steps, plugins=("switch_aux",), no_plugin=("plots", "html"))
    summary = Training(config, {}, tmp_path / "run").run().summary
    assert summary["perplexity"] == pytest.approx(exp(summary["loss"]), rel=1e-5)
    assert summary["perplexity"] < limit
    assert (summary["accuracy"], summary["layers"][0]["active"]) == (None, 8)


TEXTS = {
    "empty": (b"", "text-too-short", ["text.txt has 0 characters", "lm.length=64 need 650"]),
    "short": (b"ab" * 324, "text-too-short", ["text.txt has 648 characters", "lm.length=64 need 650"]),
    "latin-1": (b"ab" * 400 + b"\xe9t\xe9", "not-a-text", ["text.txt is not UTF-8 text", "byte 800"]),
    "binary": (b"ab\0" * 400, "not-a-text", ["text.txt"]),
    "one character": (b"a" * 700, "one-character-text", ["text.txt", "lm.file"]),
    "folder": (None, "unreadable-file", ["text.txt", "Is a directory"]),
    "absent": ("absent", "missing-file", ["text.txt", "lm.file"]),
}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The sentence with which a run of lm is refused, exit code 2 and nothing written."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        before = sorted(tmp_path.rglob("*"))
        code = main(["run", "--task", "lm", "--epochs", "1", "--quiet", *argv])
        out, err = capsys.readouterr()
        assert (2, "", before, 1) == (code, out, sorted(tmp_path.rglob("*")), err.count("\n"))
        return err.removeprefix("moe-engine: ").strip()

    return run


@pytest.mark.parametrize(("content", "code", "words"), TEXTS.values(), ids=TEXTS)
def test_a_file_that_is_not_a_text_is_refused(tmp_path, monkeypatch, content, code, words):
    monkeypatch.chdir(tmp_path)
    if content is None:
        Path("text.txt").mkdir()
    elif content != "absent":
        Path("text.txt").write_bytes(content)
    with refused(code, *words):
        Lm(file="text.txt").moe_task(TaskSpec())


def test_a_refused_text_is_one_sentence_and_leaves_nothing_behind(refusal, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"ab\0" * 400)
    assert refusal("--set", "lm.file=text.txt") == "text.txt is not a text: it contains zero bytes"


SETTINGS = {
    "absent": ("file=a.txt", "there is no text file a.txt, neither at that path nor in data; set lm.file"),
    "heads": ("heads=5", "lm.heads=5 does not divide lm.dim=64; change one of them"),
    "every": ("every=3", "lm.every=3 leaves no block with experts, as lm.layers=2; lower it"),
    "layers": ("layers=1", "task 'lm': 'layers' must be >= 2: 1"),
}


@pytest.mark.parametrize(("setting", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_wrong_setting_is_refused(refusal, setting, expected):
    assert expected == refusal("--set", f"lm.{setting}")


def test_650_characters_are_enough_and_a_file_here_comes_before_one_among_the_data(tmp_path, monkeypatch):
    """Ends of line are one character, whatever system wrote them; a byte order mark is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    Path("data/text.txt").write_bytes(b"xyz" * 500)
    Path("text.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 216 + b"ab")
    (train,) = Lm(file="text.txt").moe_task(TaskSpec()).train
    assert (train.shape[1], train[0, :4].tolist()) == (65, [1, 2, 0, 1])
    Path("text.txt").unlink()
    assert Lm(file="text.txt").moe_task(TaskSpec()).train[0].shape[0] == 1 + (1350 - 65) // 8
