"""`moe-engine inspect`: its numbers are those of the router's logits, by NumPy; its errors are sentences."""

import json
import re

import numpy as np
import pytest

from moe_engine.cli import main
from moe_engine.errors import visible
from moe_engine.pretrained.loading import load_model
from support import refused

from .tiny import EXPERTS, LAYERS, TOP_K, build, name, transformers

LENGTH = 7
TEXTS = {
    "prose.txt": "to be or not to be, that is the question.\nto be!\n" * 4,
    "code.py": "x = [1, 2]\nprint(x)\n" * 9,
}
CHARS = sorted({char for text in TEXTS.values() for char in text} | {"\x1b", "<", "\u202e"})


def tokenizer():
    """One token per character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"?": 0, **{char: at for at, char in enumerate(CHARS, 1)}}, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tiny Mixtral, and texts."""
    folder = tmp_path_factory.mktemp("inspect")
    build("Mixtral").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for file, text in TEXTS.items():
        (folder / file).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def inside(here, monkeypatch):
    monkeypatch.chdir(here)


def inspected(capsys, *words):
    assert main(["inspect", "model", "--length", str(LENGTH), *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def windows(ids):
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


@pytest.fixture(scope="module")
def decided(here):
    """By layer the softmax probabilities [T, E] and choices [T, K] of each text, from a hook on the router."""
    import torch

    model, made = load_model(here / "model"), tokenizer()
    caught = {at: [] for at in range(LAYERS)}
    for at, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, __, out, at=at: caught[at].append(out[0].detach().double()))
    out = {at: {} for at in range(LAYERS)}
    for file, text in TEXTS.items():
        for ids in windows(made(text)["input_ids"]):
            model(torch.tensor([ids]))
        for at, logits in caught.items():
            exp_TE = np.exp(np.concatenate(logits))
            p_TE = exp_TE / exp_TE.sum(1, keepdims=True)
            out[at][file] = p_TE, np.argsort(-p_TE, axis=1)[:, :TOP_K]
            logits.clear()
    return out


def counts(expert_TK):
    return np.bincount(expert_TK.ravel(), minlength=EXPERTS)


def entropy(share):
    return -sum(x * np.log2(x) for x in share if x)


# -- numbers ---------------------------------------------------------------------------------------------


def test_balance_and_confidence_are_those_of_the_routers_own_logits(capsys, decided):
    report = inspected(capsys, "--text", "prose.txt", "code.py")
    assert [row["layer"] for row in report["layers"]] == [name(at) for at in range(LAYERS)]
    for at, row in enumerate(report["layers"]):
        p_TE = np.concatenate([decided[at][file][0] for file in TEXTS])
        count_E = sum(counts(decided[at][file][1]) for file in TEXTS)
        assert row["counts"] == count_E.tolist()
        assert np.allclose(row["load"], count_E / count_E.sum())
        assert row["cv"] == pytest.approx(count_E.std() / count_E.mean())
        assert row["maxvio"] == pytest.approx(count_E.max() / count_E.mean() - 1)
        assert row["entropy"] == pytest.approx(entropy(count_E / count_E.sum()) / np.log2(EXPERTS))
        assert row["active"] == (count_E >= count_E.mean() / 10).sum()
        ordered_TE = -np.sort(-p_TE, axis=1)
        assert row["router"]["top_probability"] == pytest.approx(ordered_TE[:, 0].mean(), rel=1e-5)
        assert row["router"]["margin"] == pytest.approx((ordered_TE[:, 1] - ordered_TE[:, 2]).mean(), rel=1e-4)
        uncertain = -(p_TE * np.log(p_TE)).sum(1).mean() / np.log(EXPERTS)
        assert row["router"]["router_entropy"] == pytest.approx(uncertain, rel=1e-5)


def test_divergences_and_lifts_of_labels(capsys, decided):
    report = inspected(capsys, "--text", "prose.txt", "code.py", "--label", "prose", "--label", "code")
    assert report["labels"] == {label: len(text) for label, text in zip(("prose", "code"), TEXTS.values(), strict=True)}
    for at, row in enumerate(report["layers"]):
        count_CE = np.array([counts(decided[at][file][1]) for file in TEXTS])
        p_E, q_E = count_CE / count_CE.sum(1, keepdims=True)
        both_E = count_CE.sum(0) / count_CE.sum()
        bits = entropy((p_E + q_E) / 2) - (entropy(p_E) + entropy(q_E)) / 2
        assert np.allclose(row["divergence"], [[0, bits], [bits, 0]], atol=1e-12)
        for label, share_E in (("prose", p_E), ("code", q_E)):
            assert np.allclose(row["labels"][label]["load"], share_E)
            lift_E = [share / whole if whole else None for share, whole in zip(share_E, both_E, strict=True)]
            assert row["labels"][label]["lift"] == pytest.approx(lift_E)


def test_divergence_by_chance():
    """The formula, against labels that are drawn from one load."""
    from moe_engine.analysis.usage import by_chance, divergences

    draw = np.random.default_rng(0)
    load_E = draw.dirichlet(np.full(16, 4.0))
    tables = [np.stack([draw.multinomial(n, load_E) for n in (800, 300)]) for _ in range(300)]
    measured = np.mean([divergences(table)[0, 1] for table in tables])
    assert by_chance(tables[0])[0, 1] == pytest.approx(measured, rel=0.1)


def test_characteristic_tokens_and_contexts(capsys, decided):
    report, at = inspected(capsys, "--text", "prose.txt", "code.py"), 1
    text = "".join(TEXTS.values())
    expert_TK = np.concatenate([decided[at][file][1] for file in TEXTS])
    p_TE = np.concatenate([decided[at][file][0] for file in TEXTS])
    load_E = counts(expert_TK) / expert_TK.size
    for expert, of_expert in enumerate(report["layers"][at]["of_experts"]):
        chosen_T = (expert_TK == expert).any(1)
        lifts = {}
        for char in set(text):
            is_T = np.array([other == char for other in text])
            if (chosen_T & is_T).sum() >= 5 and load_E[expert]:
                lifts[char] = (chosen_T & is_T).sum() / (TOP_K * is_T.sum()) / load_E[expert]
        best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[:8]
        assert [one["lift"] for one in of_expert["tokens"]] == pytest.approx(best)
        assert all(one["lift"] == pytest.approx(lifts[one["token"]]) for one in of_expert["tokens"])
        surest = of_expert["contexts"][0]
        assert surest["probability"] == pytest.approx(p_TE[chosen_T, expert].max(), rel=1e-5)
        assert surest["before"] + surest["token"] + surest["after"] in TEXTS[surest["label"]]


def test_the_sample_has_each_tokens_experts_and_gates(capsys, decided):
    report = inspected(capsys, "--text", "prose.txt", "code.py")
    for one in report["sample"]:
        assert "".join(one["tokens"]) == TEXTS[one["label"]][: len(one["tokens"])]
        for at, (experts, gates) in enumerate(zip(one["experts"], one["gates"], strict=True)):
            p_TE, chosen_TK = decided[at][one["label"]]
            assert experts == chosen_TK[: len(experts)].tolist()
            kept_TK = np.take_along_axis(p_TE, chosen_TK, 1)[: len(experts)]
            assert np.allclose(gates, kept_TK / kept_TK.sum(1, keepdims=True), atol=1e-3)


def test_texts_of_one_label_are_counted_together(capsys):
    report = inspected(capsys, "--text", "prose.txt", "--text", "code.py", "--label", "all", "--label", "all")
    assert report["labels"] == {"all": sum(map(len, TEXTS.values()))}
    assert report["layers"][0]["divergence"] == [[0.0]]


def test_a_margin_needs_one_list_of_scores():
    """DeepSeek-V3 takes the best of the best groups, by sigmoid and bias: no margin; without groups there is one."""
    import torch

    from moe_engine.pretrained.inspecting import Passage, inspect

    ids = np.random.default_rng(0).integers(3, 50, 200)
    for groups, known in ((4, False), (1, True)):
        model = build("DeepseekV3", n_group=groups, topk_group=max(1, groups // 2))
        inspector = inspect(model, [Passage("", 0, ids, False)], ["x"], 20, 2)
        (first, *_), gate = inspector.layers, model.model.layers[0].mlp.gate
        sure = first.sure()
        assert (sure["margin"] is not None) == known
        caught = []
        gate.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
        model(torch.tensor(ids[None, :20]))
        score_TE = torch.sigmoid(caught[0].reshape(-1, 16).float() @ gate.weight.float().T)
        by_TE = score_TE + gate.e_score_correction_bias
        if known:
            assert first.expert_TK[:20].tolist() == by_TE.topk(TOP_K).indices.tolist()


def test_an_adopted_model_is_inspected_by_its_engine():
    """The same choices as those of the plain model, with its labels in the trace, and nothing counted."""
    from moe_engine import Engine, adopt
    from moe_engine.pretrained.inspecting import Passage, inspect

    ids = np.random.default_rng(0).integers(3, 50, 100)
    passages = [Passage("a", 0, ids[:60], False), Passage("b", 1, ids[60:], False)]
    plain = inspect(build("Mixtral"), passages, ["a", "b"], 16, 2, record=True)
    engine = Engine()
    model = adopt(engine, build("Mixtral"))
    own = inspect(model, passages, ["a", "b"], 16, 2, record=True, engine=engine)
    for one, other in zip(plain.layers, own.layers, strict=True):
        assert np.array_equal(one.expert_TK, other.expert_TK)
        assert one.sure()["top_probability"] == pytest.approx(other.sure()["top_probability"])
        assert other.sure()["margin"] > 0
    for trace in (plain.trace, own.trace):
        labels = [label for forward in trace.layers[0].forwards for label in forward.labels.tolist()]
        assert labels == [0] * 60 + [1] * 40
    assert not any("load" in metrics for metrics in engine.metrics("eval").values())


def test_a_run_is_inspected_by_its_newest_checkpoint(here, capsys):
    settings = {"model": here / "model", "file": here / "prose.txt", "length": 16}
    words = [word for name, value in settings.items() for word in ("--set", f"causal_lm.{name}={value}")]
    quick = ("--steps", "1", "--batch-size", "2", "--no-plugin", "plots,html", "--device", "cpu", "--quiet")
    assert main(["run", "--task", "causal_lm", *words, *quick, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["inspect", "run", "--text", "prose.txt", "code.py", "--trace", "run.routing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == sum(map(len, TEXTS.values()))
    assert main(["replay", "run.routing", "--by-label"]) == 0
    assert "code.py" in capsys.readouterr().out


# -- what is written -------------------------------------------------------------------------------------


def test_a_trace_is_replayed_and_counted(capsys, here):
    words = ("--text", "prose.txt", "code.py", "--label", "prose", "--label", "code")
    report = inspected(capsys, *words, "--trace", "t.routing", "--counts", "c.csv")
    assert main(["replay", "t.routing", "--by-label", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert not replayed["trace"]["cut"]
    rows = {(row["layer"], row["label"], "recorded" in row): row for row in replayed["rows"]}
    for row in report["layers"]:
        for label, found in ((None, row), *row["labels"].items()):
            for recorded in (True, False):
                again = rows[row["layer"], label, recorded]
                assert again["load"] == pytest.approx(found["load"])
                assert (again["agreement"], again["first"]) == (1, 1)
    loads = []
    for file in ("c.csv", "t.routing"):
        assert main(["routing-stats", file, "--json"]) == 0
        stats = json.loads(capsys.readouterr().out)
        loads.append([(row["layer"], row["split"], row["tokens"], row["top_k"], row["load"]) for row in stats["rows"]])
        for row in stats["rows"]:
            told = next(one for one in report["layers"] if one["layer"] == row["layer"])["labels"][row["split"]]
            assert (row["cv"], row["total"]) == (pytest.approx(told["cv"]), sum(told["counts"]))
    assert loads[0] == loads[1]


def test_every_limit_is_told(capsys, here):
    assert main(["inspect", "model", "--text", "prose.txt", "--tokens", "30", "--html", "x.html"]) == 0
    out = capsys.readouterr().out
    assert "only the first 30 tokens of prose.txt were read; --tokens reads more" in out
    assert "30 tokens in windows of 64" in out
    assert "Only the first 30 tokens of prose.txt were read; --tokens reads more." in (here / "x.html").read_text()
    assert main(["inspect", "model", "--text", "prose.txt", "--tokens", "100000"]) == 0
    assert "first" not in capsys.readouterr().out


def test_the_page_is_whole_and_escaped(capsys, here):
    """What tokens and labels hold can neither become markup, nor steer a terminal, nor turn text around."""
    (here / "evil.txt").write_text("<\x1b\u202ex" * 30)
    words = ("--text", "evil.txt", "code.py", "--label", "<i>\x1b[2J", "--label", "code", "--html", "evil.html")
    assert main(["inspect", "model", *words]) == 0
    shown, page = capsys.readouterr().out, (here / "evil.html").read_text()
    for text in (shown, page):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "<i>" not in page and "&lt;i&gt;\\x1b[2J" in page
    assert "<i>\\x1b[2J" in shown
    assert not re.search(r"(?:src|href)=|https?://|@import", page)
    main(["inspect", "model", *words[:-2], "--json"])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().out)


def test_a_page_of_a_large_model_stays_small(capsys, monkeypatch):
    """Detail goes, layer after layer and token after token, and the page says so."""
    from moe_engine.pretrained import inspection_page

    report = inspected(capsys, "--text", "prose.txt", "code.py")
    whole = inspection_page.page_of(report, [])
    assert "To stay small" not in whole
    for part in (0.95, 0.8):
        monkeypatch.setattr(inspection_page, "LARGEST", part * len(whole.encode()))
        page = inspection_page.page_of(report, [])
        assert len(page.encode()) < part * len(whole.encode())
        assert "To stay small, this page shows" in page


def test_visible():
    assert visible("a\tb\n\x1b\x9b\u200b\u202e é") == "a⇥b↵\\x1b\\x9b\\u200b\\u202e é"


# -- what is wrong ---------------------------------------------------------------------------------------

WRONG = {
    "labels": (["--text", "prose.txt", "code.py", "--label", "x"], "labels-do-not-fit", ("2 texts have 1 labels",)),
    "mixed": (["--text", "prose.txt", "code.py", "--text", "code.py"], "texts-mixed", ("code.py",)),
    "absent": (["--text", "absent.txt"], "unreadable-text", ("absent.txt", "No such file")),
    "folder": (["--text", "model"], "unreadable-text", ("model", "directory")),
    "empty": (["--text", "empty.txt"], "empty-text", ("empty.txt",)),
    "binary": (["--text", "binary.txt"], "not-text", ("binary.txt", "UTF-8")),
    "window": (["--text", "prose.txt", "--length", "65"], "too-long-window", ("65", "64")),
    "page": (["--text", "prose.txt", "--html", "absent/x.html"], "unwritable-file", ("--html", "does not exist")),
    "trace": (["--text", "prose.txt", "--trace", "model"], "unwritable-file", ("--trace", "folder")),
    "device": (["--text", "prose.txt", "--device", "cud"], "unknown-device", ("cud",)),
}


@pytest.mark.parametrize(("words", "code", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_a_sentence(here, capsys, monkeypatch, words, code, said):
    from moe_engine import cli

    (here / "empty.txt").write_text("")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before, caught = sorted(here.rglob("*")), []
    ending = cli._ending
    monkeypatch.setattr(cli, "_ending", lambda error: (caught.append(error), ending(error))[1])
    assert main(["inspect", "model", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines()), sorted(here.rglob("*"))) == ("", 1, before)
    assert caught[0].code == code and all(word in err for word in said), err


def test_folders_without_a_mixture(here, tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--text", "prose.txt"]) == 2
    assert "no weights" in capsys.readouterr().err
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=60, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "dense"), "--text", "prose.txt"]) == 2
    err = capsys.readouterr().err
    assert "LlamaForCausalLM" in err and len(err.splitlines()) == 1


def test_a_tokenizer_of_another_model(here):
    from moe_engine.pretrained.inspecting import Passage, inspect

    with refused("tokenizer-does-not-fit", "a token 50", "embeds 50"):
        inspect(build("Mixtral"), [Passage("", 0, np.array([3, 50]), False)], ["x"], 8, 1)
