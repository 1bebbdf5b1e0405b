"""Routing counts: read from files, reported on, and refused if they are invalid."""

import csv
import io
import json
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest

from moe_engine import hookimpl
from moe_engine.analysis.counts import read_counts
from moe_engine.cli import main
from moe_engine.run.folder import read_run

EXAMPLES = Path(__file__).parents[2] / "examples" / "counts"
SMALL = "layer,split,e0,e1\n0,train,3,1\n"


@pytest.fixture
def stats(tmp_path, capsys):
    """stats(content, *flags, name=...): the report on a file of this content, or on files by path, as JSON."""

    def ask(content, *flags, name="counts.csv"):
        if isinstance(content, str):
            content = tmp_path / name if (tmp_path / name).write_text(content, "utf-8") else None
        assert main(["routing-stats", str(content), *flags, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def refusal(tmp_path, capsys):
    """refusal(content, *flags): the sentence with which a file is refused, without the file's path."""

    def ask(content, *flags, name="counts.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert main(["routing-stats", str(path), *flags]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1
        return err.strip().removeprefix("moe-engine: ").replace(str(path), "FILE")

    return ask


def loads(report):
    """{(layer, split): load times total} of a report."""
    return {
        (row["layer"], row["split"]): [round(one * row["total"], 6) for one in row["load"]] for row in report["rows"]
    }


# -- published numbers -----------------------------------------------------------------------------

GOLDEN = {  # population cv, its square, Gini, entropy / ln E, max / min, MaxVio: of the counts, computed elsewhere
    ("1", "train"): (0.088946, 0.007911, 0.049343, 0.997795, 1.279908, 0.129101),
    ("2", "train"): (0.087162, 0.007597, 0.049043, 0.997879, 1.272125, 0.117177),
    ("1", "validation"): (0.099563, 0.009913, 0.051660, 0.997232, 1.236522, 0.110937),
    ("2", "validation"): (0.110005, 0.012101, 0.061502, 0.996630, 1.390227, 0.172461),
    ("0", "all"): (1.670919, 2.791970, 0.717180, 0.568362, 466.416667, 4.597000),
}


@pytest.mark.parametrize(("file", "top_k"), [("transformer_6_experts.csv", 3), ("cifar10_10_experts.csv", 4)])
def test_the_numbers_of_published_counts_to_six_digits(stats, file, top_k):
    rows = stats(EXAMPLES / file, "--top-k", str(top_k))["rows"]
    for row in rows:
        got = [row[name] for name in ("cv", "cv2", "gini", "entropy", "max_min", "maxvio")]
        assert GOLDEN[row["layer"], row["split"]] == pytest.approx(got, abs=6e-7)
    assert len(rows) == (4 if top_k == 3 else 1)


def test_published_totals_that_contradict_each_other_are_named(stats):
    """1,342,280 and 1,346,000 assignments of the same tokens, and neither a multiple of three choices."""
    first, second, third = stats(EXAMPLES / "transformer_6_experts.csv", "--top-k", "3")["warnings"]
    assert "layer 1, train: its 1,342,280 assignments are not any number of tokens x 3 choices" in first
    assert "layer 2, train: its 1,346,000 assignments" in second
    assert "train: assignments are 1,342,280 in layer 1, but 1,346,000 in layer 2" in third


def test_a_published_share_that_four_choices_cannot_give_is_named(stats):
    """55.97 % for one expert, where each token chooses four different ones: at most a quarter."""
    (warning,) = stats(EXAMPLES / "cifar10_10_experts.csv", "--top-k", "4")["warnings"]
    assert "expert 0 has a share of 0.5597, but if each token chooses 4 different experts, none can ha" in warning
    assert stats(EXAMPLES / "cifar10_10_experts.csv")["warnings"] == []


def test_verdict_threshold_and_advice_are_the_metrics_own(stats):
    rows = stats(EXAMPLES / "transformer_6_experts.csv")["rows"]
    assert [row["verdict"]["name"] for row in rows] == ["healthy"] * 4
    assert rows[3]["verdict"]["why"] == "the cv of the load is 0.11 (limit 0.3), and all 6 experts are active"
    strict = stats(EXAMPLES / "transformer_6_experts.csv", "--set", "health.imbalance=0.1")["rows"]
    assert [row["verdict"]["name"] for row in strict] == ["healthy"] * 3 + ["imbalanced"]
    (flat,) = stats(EXAMPLES / "cifar10_10_experts.csv", "--top-k", "4")["rows"]
    assert flat["verdict"]["name"] == "collapsed"  # exp(H) = 10^0.568362 = 3.70, at most 1.25 x 4
    assert flat["verdict"]["why"] == "effectively 3.7 of 10 experts are used (limit 5.0)"
    assert flat["verdict"]["advice"].startswith("add or strengthen a balancing loss or bias")


@pytest.mark.parametrize("file", ["olmoe.csv", "mixtral.csv"])
def test_real_models_counts_agree_with_an_independent_reading(stats, file):
    """With the csv module and numpy alone; every row adds up to tokens x choices."""
    report = stats(EXAMPLES / file)
    with open(EXAMPLES / file, encoding="utf-8") as lines:
        read = list(csv.DictReader(lines))
    assert len(read) == len(report["rows"])
    for line, row in zip(read, report["rows"], strict=True):
        x = np.array([float(value) for name, value in line.items() if name.startswith("e")])
        f = x / x.sum()
        entropy = -(f[f > 0] * np.log(f[f > 0])).sum() / np.log(len(f))
        numbers = [x.std() / x.mean(), entropy, x.max() / x.mean() - 1, (x >= x.mean() / 10).sum()]
        assert numbers == pytest.approx([row[name] for name in ("cv", "entropy", "maxvio", "active")])
        assert (line["model"], line["layer"], int(line["tokens"])) == (
            row["labels"]["model"],
            row["layer"],
            row["tokens"],
        )
        assert int(line["choices_per_token"]) == row["top_k"]
    assert report["warnings"] == report["changes"] == []


# -- forms -----------------------------------------------------------------------------------------

EXPECTED = {("0", "train"): [3, 1], ("0", "test"): [2, 2], ("1", "train"): [0, 4], ("1", "test"): [1, 3]}
FORMS = {
    "wide.csv": "layer,split,expert0,expert1\n0,train,1,1\n0,train,2,0\n0,test,2,2\n1,train,0,4\n1,test,1,3\n",
    "steps.csv": "e1,Step,e0,split,LAYER\n1,1,1,train,0\n0,2,2,train,0\n2,1,2,test,0\n4,1,0,train,1\n3,2,1,test,1\n",
    "long.csv": "layer,split,expert,count\n0,train,0,3\n0,train,1,1\n0,test,1,2\n0,test,0,2\n1,train,1,4\n1,train,0,0\n"
    "1,test,0,1\n1,test,1,3\n",
    "quoted.csv": '\ufefflayer,split,e0,e1\r\n"0","train",3,1\r\n\r\n0,test, 2,2\r\n1,train,0.0,4e0\r\n1,test,1,3\r\n',
    "nested.json": '{"0": {"train": [3, 1], "test": [2, 2]}, "1": {"train": [0, 4], "test": [1, 3]}}',
    "wide.json": json.dumps(
        [{"layer": layer, "split": split, "e0": x[0], "e1": x[1]} for (layer, split), x in EXPECTED.items()], indent=1
    ),
    "counts.json": json.dumps([{"layer": int(at), "split": split, "counts": x} for (at, split), x in EXPECTED.items()]),
    "counts.jsonl": "\n".join(
        json.dumps({"layer": at, "split": split, "counts": x}) for (at, split), x in EXPECTED.items()
    ),
    "long.jsonl": "\n".join(
        json.dumps({"layer": at, "split": split, "expert": e, "count": one})
        for (at, split), x in EXPECTED.items()
        for e, one in enumerate(x)
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_sums(stats, name):
    """Several rows of a layer and split are added up, also over steps; order and case of columns are free."""
    assert loads(stats(FORMS[name], name=name)) == EXPECTED


def test_standard_input_is_read(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMS["wide.csv"].encode())))
    assert main(["routing-stats", "-", "--json"]) == 0
    assert loads(json.loads(capsys.readouterr().out)) == EXPECTED


@pytest.mark.parametrize(
    "content", ["e0,e1\n3,1\n", '{"e0": 3, "e1": 1}', "expert,count\n0,3\n1,1\n", '{"counts": [3, 1]}']
)
def test_layer_and_split_may_be_left_out(stats, content):
    assert loads(stats(content)) == {("0", "all"): [3, 1]}


def test_layers_of_json_may_have_different_numbers_of_experts(stats):
    assert loads(stats('{"a": [1, 1], "b": [1, 0, 1]}')) == {("a", "all"): [1, 1], ("b", "all"): [1, 0, 1]}


def test_other_columns_are_labels_and_tokens_are_added_up(stats):
    content = "model,layer,split,choices_per_token,tokens,e0,e1,e2\n"
    content += "A,0,train,2,5,4,4,2\nA,0,train,2,5,2,4,4\nB,0,train,1,7,7,0,0\n"
    first, second = stats(content)["rows"]
    assert tuple(first[name] for name in ("labels", "top_k", "tokens", "total")) == (
        {"model": "A", "choices_per_token": "2"},
        2,
        10,
        20,
    )
    assert (second["labels"]["model"], second["top_k"], second["tokens"]) == ("B", 1, 7)


def test_tokens_of_the_long_form_count_once_for_each_expert(stats):
    content = "step,expert,count,tokens\n1,0,3,4\n1,1,5,4\n2,0,4,4\n2,1,4,4\n"
    (row,) = stats(content, "--top-k", "2")["rows"]
    assert (row["tokens"], row["total"]) == (8, 16)


def test_labels_are_added_up_over_on_request(stats):
    content = "domain,layer,split,e0,e1\na,0,all,1,2\nb,0,all,3,4\n"
    assert [row["labels"] for row in stats(content)["rows"]] == [{"domain": "a"}, {"domain": "b"}]
    assert loads(stats(content, "--sum", "domain")) == {("0", "all"): [4, 6]}
    assert loads(stats(content.replace("split", "x"), "--split", "Domain")) == {("0", "a"): [1, 2], ("0", "b"): [3, 4]}


def test_experts_without_a_row_count_as_zero_and_are_named(stats):
    """A cv that leaves out dead experts looks better than it is."""
    content = "layer,expert,count\n0,0,2\n0,3,2\n1,0,4\n1,1,0\n1,2,0\n1,3,0\n"
    report = stats(content)
    assert loads(report) == {("0", "all"): [2, 0, 0, 2], ("1", "all"): [4, 0, 0, 0]}
    assert report["rows"][0]["cv"] == pytest.approx(1)
    assert [warning.partition(": ")[2] for warning in report["warnings"]] == [
        "layer 0, all: there is no row for expert 1 and 2; counted as 0"
    ]
    assert loads(stats(content, "--experts", "6"))["0", "all"] == [2, 0, 0, 2, 0, 0]


def test_shares_are_not_put_down_to_chance(stats):
    """Of 4 counted assignments cv 1 is within twice sqrt(E / (T K)) = 1.4; of shares nothing is known."""
    assert stats("e0,e1,e2,e3\n1,2,1,0\n", "--set", "health.dead=0")["rows"][0]["verdict"]["name"] == "healthy"
    (row,) = stats("e0,e1,e2,e3\n0.25,0.5,0.25,0\n", "--set", "health.dead=0")["rows"]
    assert (row["tokens"], row["verdict"]["name"]) == (None, "imbalanced")


# -- two splits, and contradictions ----------------------------------------------------------------


def test_train_against_validation(stats):
    """Shares 1/2, 1/4, 1/4 and 1/4, 1/4, 1/2: half of |-1/4| + 0 + |1/4|; they correlate by -1/2."""
    content = "split,e0,e1,e2\nvalidation,1,1,2\ntraining,4,2,2\n"
    (change,) = stats(content)["changes"]
    assert (change["split"], change["against"]) == ("validation", "training")
    assert pytest.approx((change["total_variation"], change["correlation"], change["cv_change"])) == (0.25, -0.5, 0.0)
    assert change["moved"] == {"expert": 0, "from": 0.5, "to": 0.25}
    (flat,) = stats("split,e0,e1\ntrain,2,2\ntest,3,1\n")["changes"]
    assert (flat["correlation"], flat["cv_change"]) == (None, 0.5)


@pytest.mark.parametrize(
    ("content", "flags", "sentence"),
    [
        ("tokens,e0,e1\n5,3,3\n", ("--top-k", "1"), "its 6 assignments are not 5 tokens x 1 choices"),
        ("tokens,e0,e1,e2\n5,6,2,2\n", ("--top-k", "2"), "expert 0 has 6 assignments of 5 tokens"),
        ("e0,e1,e2\n6,2,2\n", ("--top-k", "2"), "expert 0 has a share of 0.6"),
        ("e0,e1,e2\n3,3,1\n", ("--top-k", "2"), "its 7 assignments are not any number of tokens x 2"),
        ("layer,e0,e1\n0,3,3\n1,3,4\n", (), "assignments are 6 in layer 0, but 7 in layer 1"),
        ("layer,e0,e1\n0,50.5,49.5\n1,70.5,19.5\n", (), "assignments are 90 in layer 1, but 100 in layer 0"),
    ],
)
def test_what_cannot_be_is_named(stats, content, flags, sentence):
    (warning,) = stats(content, *flags)["warnings"]
    assert sentence in warning


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("tokens,e0,e1,e2\n5,5,3,2\n", ("--top-k", "2")),
        ("layer,e0,e1\n0,50.51,49.5\n1,70.5,29.5\n", ()),  # rounded
        ("layer,choices_per_token,e0,e1\n0,1,2,2\n0,2,4,4\n", ()),
    ],
)
def test_what_can_be_is_not_warned_of(stats, content, flags):
    assert stats(content, *flags)["warnings"] == []


# -- metrics and runs ------------------------------------------------------------------------------


def test_metrics_of_others_answer_too_and_those_that_cannot_are_named(stats, install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_metrics(self, stats):
            return {"top_share": stats.load.max() / stats.load.sum()}

    install("metric", "mine", Mine)
    report = stats("e0,e1,e2\n6,2,2\n", "--plugins", "mine,co_activation", "--top-k", "2")
    assert pytest.approx(report["rows"][0]["top_share"]) == 0.6
    assert report["unanswered"] == ["co_activation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run, with its routing recorded."""
    out = tmp_path_factory.mktemp("runs") / "run"
    argv = ["run", "--epochs", "2", "--no-plugin", "plots,html", "--log-every", "5", "--record-routing", "--quiet"]
    assert main([*argv, "--out", str(out)]) == 0
    return out


def test_a_runs_test_counts_give_its_summary_again(stats, folder):
    """Whole counts of all choices of the test set, and the numbers of summary.json."""
    run, report = read_run(folder), stats(folder)
    train, test = report["rows"]
    (layer,) = run.summary["layers"]
    assert [layer[name] for name in ("cv", "gini", "entropy", "active")] == pytest.approx(
        [test[name] for name in ("cv", "gini", "entropy", "active")]
    )
    images = sum(map(sum, run.records[-1]["layers"]["moe"]["class_expert"])) / 2
    assert (2 * images, 2, "counts of the test set, summed over classes") == (
        test["total"],
        test["top_k"],
        test["source"],
    )
    last = [one for one in run.records if one["split"] == "train" and one["step"] > 0.9 * run.summary["steps"]]
    mean = np.mean([one["layers"]["moe"]["load"] for one in last], axis=0)
    assert mean.tolist() == pytest.approx(train["load"])
    assert report["changes"][0]["split"] == "test" and report["warnings"] == []


@pytest.mark.parametrize("trace", [True, False])
def test_a_run_without_classes_is_read_from_its_trace_or_its_shares(stats, folder, tmp_path, trace):
    for name in ("summary.json", "config.toml", *(["routing.safetensors"] if trace else [])):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["layers"]["moe"].pop("class_expert", None)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole, report = stats(folder)["rows"][1], stats(tmp_path)["rows"][1]
    assert whole["cv"] == pytest.approx(report["cv"])
    assert (whole["total"] if trace else pytest.approx(1)) == report["total"]
    assert (whole["total"] / 2 if trace else None) == report["tokens"]
    assert ("recorded routing" in report["source"]) == trace


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [({"mass": [0.5, 0.5]}, "holds no loads: its layers assign nothing"), ({"load": ["a"]}, "is damaged: its loads")],
)
def test_a_run_without_loads_is_refused(tmp_path, capsys, layer, sentence):
    (tmp_path / "config.toml").write_text("[run]\n")
    (tmp_path / "summary.json").write_text('{"loss": 1, "layers": [{"name": "moe", "top_k": 2}]}')
    record = {"split": "eval", "step": 1, "layers": {"moe": layer}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record))
    assert main(["routing-stats", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


# -- what is printed and drawn ---------------------------------------------------------------------


def test_the_terminal_shows_tables_reasons_and_warnings(capsys, tmp_path):
    picture = tmp_path / "heat.svg"
    files = [str(EXAMPLES / name) for name in ("transformer_6_experts.csv", "cifar10_10_experts.csv")]
    assert main(["routing-stats", *files, "--figure", str(picture)]) == 0
    out = capsys.readouterr().out
    for words in (
        *("0.08895", "0.9978", "466.4", "total variation", "expert 0: 15.58% to 18.52%", "healthy, 4 of 5"),
        *(
            "dead experts, 1 of 5: add or strengthen",
            "warning: ",
            "assuming 1 (set it with --top-k)",
            "taken as shares",
        ),
        f"figure: {picture}",
    ):
        assert words in out
    drawn = picture.read_text()
    assert "layer 2, validation" in drawn and "share of each expert over the mean" in drawn


def test_a_picture_of_many_rows_and_dead_layers_is_drawn(tmp_path, capsys):
    rows = "".join(f"{layer},{layer % 7},0\n" for layer in range(400))
    (tmp_path / "counts.csv").write_text("layer,e0,e1\n" + rows)
    assert main(["routing-stats", str(tmp_path / "counts.csv"), "--figure", str(tmp_path / "heat.png")]) == 0
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert "no data, 58 of 400" in capsys.readouterr().out


def test_a_hundred_thousand_rows_are_summed_right(tmp_path):
    """More than one chunk, against numpy's own sum."""
    generator = np.random.default_rng(0)
    layer_R, count_RE = generator.integers(0, 3, 100_000), generator.integers(0, 1000, (100_000, 4))
    lines = [f"{at},{','.join(map(str, row))}" for at, row in zip(layer_R, count_RE.tolist(), strict=True)]
    (tmp_path / "counts.csv").write_text("layer,e0,e1,e2,e3\n" + "\n".join(lines))
    series, _ = read_counts(tmp_path / "counts.csv")
    assert {str(at): count_RE[layer_R == at].sum(0).tolist() for at in range(3)} == {
        one.layer: one.count_E.tolist() for one in series
    }


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (SMALL + "0,train,-1,1\n", "FILE, line 3: e0 is '-1', and a count is never below 0"),
        (SMALL + "0,train,1,many\n", "FILE, line 3: e1 is 'many', which is not a number"),
        (SMALL + "0,train,1,\n", "FILE, line 3: e1 is '', which is not a number"),
        (SMALL + "0,train,nan,1\n", "FILE, line 3: e0 is 'nan', which is not a number"),
        (SMALL + "0,train,inf,1\n", "FILE, line 3: e0 is 'inf', and a count is never above 1e+15"),
        (SMALL + f"0,train,{'9' * 400},1\n", f"FILE, line 3: e0 is '{'9' * 40}', and a count is never above 1e+15"),
        (SMALL + "0,train,1_0,1\n", "FILE, line 3: e0 is '1_0', which is not a number"),
        (SMALL + "0,train,True,1\n", "FILE, line 3: e0 is 'True', which is not a number"),
        (SMALL + "\n\n0,train,1\n", "FILE, line 5: it has 3 cells, but the header has 4"),
        (SMALL + '"a\nb",train,1,1\n0,train,1,x\n', "FILE, line 5: e1 is 'x', which is not a number"),
        (SMALL + '0,"train,1,1\n', "FILE, line 3: this is not CSV: unexpected end of data"),
        (SMALL.encode() + b"0,tr\xe4in,1,1\n", "FILE, line 3: this is not UTF-8; save the file as UTF-8 text"),
        ("", "FILE is empty; give it a header and rows of counts"),
        (" \n\n", "FILE is empty; give it a header and rows of counts"),
        ("layer,e0,e1\n", "FILE holds no rows of counts; give it some below its header"),
        ("layer,split\n0,train\n", "FILE has no counts: it needs columns expert0, expert1, ... or e0, e1, ... or both"),
        ("layer,expert\n0,1\n", "FILE has no counts: it needs columns expert0"),
        ("e0,e2\n0,1\n", "FILE: there is no column for expert 1; number them from 0 on, without a gap"),
        ("e1,e2\n0,1\n", "FILE: there is no column for expert 0"),
        ("e0,E0\n0,1\n", "FILE: two columns are called 'e0'; rename one"),
        ("e0,expert,count\n0,1,2\n", "FILE has a column per expert, and also the columns expert and count"),
        ("expert,count\n0,1\n1.5,1\n", "FILE, line 3: expert is '1.5', but experts are whole numbers from 0 to"),
        ("expert,count\n99999999999,1\n", "FILE, line 2: expert is '99999999999', but experts are whole numbers"),
        ("layer,expert,count\n0,1,1\n0,x,1\n", "FILE, line 3: expert is 'x', which is not a number"),
        ("tokens,e0,e1\n5,1,4\n-5,1,4\n", "FILE, line 3: tokens is '-5', and a count is never below 0"),
        ("top_k,e0,e1\n1,1,4\n3,1,4\n", "FILE, line 3: '3' choices a token; with 2 experts it must be 1 to 2"),
        ("top_k,e0,e1\n1.5,1,4\n", "FILE, line 2: '1.5' choices a token"),
        ('[{"e0": 1, "e1": 2},\n{"e0": true, "e1": 2}]', "FILE, record 2: e0 is 'True', which is not a number"),
        ('[{"e0": 1, "e1": 2},\n{"e0": "1", "e1": 2}]', "FILE, record 2: e0 is '1', which is not a number"),
        ('[{"e0": 1, "e1": 2},\n{"e0": 1}]', "FILE, record 2: it and the first record differ in e1"),
        ('[{"e0": 1, "e1": NaN}]', "FILE, record 1: e1 is 'nan', which is not a number"),
        (f'[{{"e0": 1, "e1": {10**400}}}]', "FILE, record 1: e1 is '1000"),
        (f'[{{"e0": 1, "e1": {"1" * 5000}}}]', "FILE is not readable JSON: Exceeds the limit"),
        ('[{"layer": [1], "e0": 1}]', "FILE, record 1: layer is '[1]', which is not a label"),
        ('[{"layer": null, "e0": 1}]', "FILE, record 1: layer is 'None', which is not a label"),
        ('[{"e0": 1, "e0": 2}]', "FILE is not readable JSON: an object has the name 'e0' twice"),
        ("[1, 2]", "FILE, record 1: '1' is not an object of names and numbers"),
        ("[]", "FILE holds no rows of counts"),
        ("{}", "FILE holds no rows of counts"),
        ('{"a": {"train": [1, -2]}}', "FILE, record 'a', 'train': e1 is '-2', and a count is never below 0"),
        ('{"a": {"train": {"x": 1}}}', "FILE has no counts: it needs columns expert0"),
        ('{"e0": 1}\n{"e0": 2}\n{"e0":', "FILE, line 3: this is not JSON: Expecting value"),
        ('\n{"e0": 1}\n{"e0": -2}', "FILE, line 3: e0 is '-2', and a count is never below 0"),
        ('{"e0": 1\n,}', "FILE, line 2: this is not JSON: "),
        ("[" * 100_000, "FILE is not readable JSON: "),
        ('{"counts": [1, 2]}\n{"counts": [1, 2, 3]}', "FILE, line 2: it has 3 experts, but its layer has 2 further up"),
        ("id,e0\n" + "".join(f"{at},1\n" for at in range(10_001)), "FILE holds more than 10000 series, one for each"),
        (b"\x80\x04K\x01.", "FILE is a Python pickle"),
    ],
)
def test_a_bad_row_is_named_by_its_line(refusal, content, sentence):
    assert refusal(content).startswith(sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--top-k", "3"), "--top-k is 3, but FILE has 2 experts in layer 0, train"),
        (("--sum", "domain"), "no file has a column domain; there is e0, e1, layer and split"),
        (("--split", "text"), "no file has a column text; there is e0, e1, layer and split"),
        (("--plugins", "topk"), "--plugins takes metrics, but 'topk' is a router"),
        (("--plugins", "nothing"), "there is no plugin 'nothing'"),
        (("--figure", "heat.txt"), "figure heat.txt must end in .png, .svg or .pdf"),
        (
            ("--figure", "nowhere/heat.png"),
            "nowhere/heat.png can't be written: No such file or directory; name another",
        ),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(refusal, flags, sentence):
    assert refusal(SMALL, *flags).startswith(sentence)


def test_a_file_that_is_not_there_is_refused(capsys, tmp_path):
    assert main(["routing-stats", str(tmp_path / "none.csv")]) == 2
    assert "none.csv can't be read: No such file or directory" in capsys.readouterr().err
