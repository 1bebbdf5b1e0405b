"""Routing counts: read from files, reported on, and refused if they are invalid."""

import csv
import gzip
import io
import json
import sys
import time
import zipfile
from pathlib import Path

import attrs
import numpy as np
import pytest

from moe_engine import hookimpl
from moe_engine.analysis.counts import read_counts
from moe_engine.cli import main
from moe_engine.run.folder import read_run
from support import forge, refused

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
    assert rows[3]["verdict"]["why"] == "the cv of the load is 0.110 (limit 0.3), and all 6 experts are active"
    strict = stats(EXAMPLES / "transformer_6_experts.csv", "--set", "health.imbalance=0.1")["rows"]
    assert [row["verdict"]["name"] for row in strict] == ["healthy"] * 3 + ["imbalanced"]
    (flat,) = stats(EXAMPLES / "cifar10_10_experts.csv", "--top-k", "4")["rows"]
    assert flat["verdict"]["name"] == "collapsed"  # exp(H) = 10^0.568362 = 3.70, at most 1.25 x 4
    assert flat["verdict"]["why"] == "effectively 3.7 of 10 experts are used (limit 5.0)"
    assert flat["verdict"]["advice"].startswith("strengthen the balancing loss or bias")


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
    # names and marks of other tools
    "names.csv": "Layer ID,data-split,expertIdx,Token Count,part\n0,train,0,3,.75\n0,train,1,1,.25\n0,test,1,2,.5\n"
    "0,test,0,2,.5\n1,train,1,4,1\n1,train,0,0,0\n1,test,0,1,.25\n1,test,1,3,.75\n",
    "semicolons.csv": "sep=;\r\nlayer_id;split;expert_0;expert_1;\r\n0;train;3,0;1,0;\r\n0;test;2;2;\r\n"
    "1;train;0;4;\r\n1;test;1;3;\r\n;;;;\r\n",
    "tabs.tsv": "# of a census, top_k=1\nlayer_index\tphase\tE0\tE1\n0\ttrain\t3\t1\n# second half\n0\ttest\t2\t2\n"
    "1\ttrain\t0\t4\n1\ttest\t1\t3\n# total\t6\t10\n",
    "spaces.txt": " layer  split expert count\n 0 train 0 3\n 0 train 1 1\n 0  test 1 2\n 0  test 0 2\n"
    " 1 train 1 4\n 1 train 0 0\n 1  test 0 1\n 1  test 1 3\n",
    "index.csv": ",layer,split,0,1,sum\n0,0.0,train,1,0,1\n1,0.0,train,2,1,3\n2,0.0,test,2,2,4\n3,1.0,train,0,4,4\n"
    "4,1.0,test,1,3,4\n",
    "melt.csv": "layer,split,variable,value\n0,train,expert_0,3\n0,train,expert_1,1\n0,test,expert_0,2\n"
    "0,test,expert_1,2\n1,train,expert_1,4\n1,train,expert_0,0\n1,test,expert_0,1\n1,test,expert_1,3\n",
    "totals.csv": "layer,split,expert,count\n0,train,0,3\n0,train,1,1\n0,train,total,4\n0,test,1,2\n0,test,0,2\n"
    "1,train,1,4\n1,train,0,0\n1,test,0,1\n1,test,1,3\nTotal,,,16\n",
    "wandb.csv": '"Step","train/layer_0/expert_0","train/layer_0/expert_0__MIN","train/layer_0/expert_1",'
    '"train/layers.1.e0","train/layers.1.e1","val/l0/e0","val/l0/e1","val/l1/e0","val/l1/e1"\n'
    "1,1,1,1,0,3,1,1,1,0\n2,2,2,0,0,1,1,1,0,3\n",
    "experts.json": '{"0": {"train": {"0": 3, "1": 1}, "test": {"1": 2, "0": 2}},'
    '"1": {"train": {"0": 0, "1": 4}, "test": {"e0": 1, "e1": 3}}}',
    "columns.json": json.dumps(
        {"layer_idx": [0, 0, 1, 1], "split": ["train", "test"] * 2, "e0": [3, 2, 0, 1], "e1": [1, 2, 4, 3]}
    ),
    "pandas.json": '{"layer": {"0": 0, "1": 0, "2": 1, "3": 1}, "e0": {"0": 3, "1": 2, "2": 0, "3": 1},'
    '"split": {"0": "train", "1": "test", "2": "train", "3": "test"}, "e1": {"0": 1, "1": 2, "2": 4, "3": 3}}',
    "table.json": '{"columns": ["layer", "split", "counts_expert_0", "counts_expert_1"],'
    '"data": [[0, "train", 3, 1], [0, "test", 2, 2], [1, "train", 0, 4], [1, "test", 1, 3]]}',
    "steps.jsonl": "\n".join(
        json.dumps(
            {
                "step": step,
                "loss": loss,
                "split": split,
                "layers": {"0": {"load": x, "cv": loss}, "1": {"load": y, "cv": 1}},
            }
        )
        for step, loss, split, x, y in [
            (1, 2.5, "train", [1, 1], [0, 4]),
            (2, 2.25, "train", [2, 0], [0, 0]),
            (2, None, "test", [2, 2], [1, 3]),
        ]
    ),
    "matrix.jsonl": '{"step": 1, "split": "train", "expert_counts": [[1, 1], [0, 4]]}\n'
    '{"step": 2, "split": "train", "expert_counts": [[2, 0], [0, 0]]}\n'
    '{"step": 2, "split": "test", "expert_counts": [[2, 2], [1, 3]]}',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_sums(stats, name):
    """Several rows of a layer and split are added up, also over steps; order and case of columns are free."""
    report = stats(FORMS[name], name=name)
    named = {
        (layer.removeprefix("layer_"), split.replace("val", "test")): x for (layer, split), x in loads(report).items()
    }
    assert named == EXPECTED
    assert all(not row["labels"] for row in report["rows"])


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


# -- labels and values -----------------------------------------------------------------------------


def labels_of(report):
    """The labels of each series, in order."""
    return [row["labels"] for row in report["rows"]]


def test_a_column_that_differs_between_experts_is_a_value_not_a_label(stats):
    """Each row as a series of its own would be "collapsed"; the share 0.5 occurs twice."""
    content = "layer,expert,hits,rank,part,device\n0,0,10,2,.25,a\n0,1,30,1,.75,b\n1,0,20,1,.5,a\n1,1,20,2,.5,b\n"
    report = stats(content)
    assert [(row["layer"], row["cv"]) for row in report["rows"]] == [("0", 0.5), ("1", 0.0)]
    assert labels_of(report) == [{}, {}]
    (note,) = report["notes"]
    assert note.endswith("neither labels nor counts, so left out: rank, part, device")


def test_numbers_that_rows_differ_in_alone_are_labels(stats):
    """alpha and seed hold for all experts of a layer, and without them rows would be added up; pct does not."""
    head = "alpha,seed,layer,expert,count,pct\n"
    rows = [(alpha, seed, layer) for alpha in (0, 0.01) for seed in (1, 2) for layer in (0, 1)]
    lines = [
        f"{a},{s},{layer},{e},{3 * e + s},{at + e / 7}\n" for at, (a, s, layer) in enumerate(rows) for e in range(3)
    ]
    report = stats(head + "".join(lines))
    assert labels_of(report) == [{"alpha": str(alpha), "seed": str(seed)} for alpha, seed, _ in rows]


@pytest.mark.parametrize("name", ["loss", "lr", "tokens_seen", "grad/norm"])
def test_what_a_log_writes_next_to_each_step_is_no_label(stats, name):
    content = f"_step,layer,{name},e0,e1\n1,0,5,1,2\n1,1,5,3,4\n2,0,3,5,6\n2,1,3,7,8\n"
    report = stats(content)
    assert loads(report) == {("0", "all"): [6, 8], ("1", "all"): [10, 12]}
    assert labels_of(report) == [{}, {}]


def test_samples_are_added_up_and_a_text_is_a_label(stats):
    assert loads(stats("sample_id,layer,e0,e1\n0,0,1,2\n1,0,3,4\n2,1,4,6\n")) == {
        ("0", "all"): [4, 6],
        ("1", "all"): [4, 6],
    }
    assert labels_of(stats("step,domain,e0,e1\n1,a,1,2\n2,b,3,4\n")) == [{"domain": "a"}, {"domain": "b"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('layer,expert,count\n0,0,"1,234"\n0,1,"12,345,678"\n', [1234, 12345678]),
        ("layer\texpert\tcount\n0\t0\t1 234\n0\t1\t2,345\n", [1234, 2345]),
        ('layer;e0;e1\n0;1.234.567;"3"\n', [1234567, 3]),
        ("layer;e0;e1\n0;0,25;0,75\n", [0.25, 0.75]),
        ("layer,e0,e1\n0,25%,75 %\n", [0.25, 0.75]),
        ("layer,expert,tokens\n0,0,3\n0,1,4\n", [3, 4]),
        ("layer,expert_0_count,expert_1_count,expert_0_prob,expert_1_prob\n0,3,4,0.9,0.1\n", [3, 4]),
        ("token,e0,e1\n0,0,1\n1,1,0\n2,1,0\n", [2, 1]),  # a mask of choices
        ("# made by savetxt\n# expert,count\n0,3\n1,4\n", [3, 4]),
        ('[{"layer": 0, "experts": [{"expert": 1, "count": 4}, {"expert": 0, "count": 3}]}]', [3, 4]),
        ('{"0": {"layer": 0, "e0": 1, "e1": 2}, "1": {"layer": 0, "e0": 2, "e1": 2}}', [3, 4]),  # numbered rows
    ],
)
def test_numbers_and_names_as_others_write_them(stats, content, expected):
    assert loads(stats(content)) == {("0", "all"): expected}


def test_lists_without_names_are_layers_if_their_totals_agree(stats, refusal):
    report = stats("[[3, 1], [2, 2]]")
    assert loads(report) == {("0", "all"): [3, 1], ("1", "all"): [2, 2]}
    assert report["notes"][0].endswith("lists without names are taken as layers 0, 1, ...")
    assert "add up to 101 and 198, but layers of the same tokens agree" in refusal("[[42, 156], [12, 89]]")
    assert "of which nothing says what they are" in refusal("[[[3, 1], [2, 2]], [[1, 3], [2, 2]]]")


def test_totals_are_left_out_if_they_are_right(stats, refusal):
    content = "domain,e0,e1\na,1,2\nb,3,4\nGrand total,4,6\n"
    report = stats(content)
    assert labels_of(report) == [{"domain": "a"}, {"domain": "b"}]
    assert report["notes"][0].endswith("totals are not counted again (line 4)")
    sentence = "FILE, line 4: e1 is '7' in a row of totals, but the rows add up to 6"
    assert refusal(content.replace("4,6", "4,7")) == sentence


# -- single experts and rows -----------------------------------------------------------------------

STEPS = "step,layer,e0,e1,e2,e3\n20,0,4,4,0,0\n10,0,2,2,2,2\n30,0,4,4,0,0\n10,1,2,2,2,2\n"


def test_numbers_of_each_expert_over_rows_and_layers(stats):
    report = stats(STEPS, "--per-expert")
    rows, single, layers = report["per_expert"]
    assert (rows["layer"], rows["over"], rows["number"], single["number"]) == ("0", "rows", 3, 1)
    assert (rows["sum"], rows["minimum"], rows["maximum"]) == ([10, 10, 2, 2], [2, 2, 0, 0], [4, 4, 2, 2])
    assert (rows["mean"], rows["range"]) == (pytest.approx([10 / 3, 10 / 3, 2 / 3, 2 / 3]), [2, 2, 2, 2])
    assert (layers["layer"], layers["over"], layers["number"]) == ("all", "layers", 2)
    assert (layers["mean"], layers["range"]) == ([6, 6, 2, 2], [8, 8, 0, 0])
    assert "per_expert" not in stats(STEPS) and "stability" not in stats(STEPS)


def test_stability_is_the_move_from_step_to_step(stats):
    """Steps in order: shares 1/4 each, then twice 1/2, 1/2, 0, 0. The first move is half of 4 x 1/4; cv 0, 1, 1."""
    (row,) = stats(STEPS, "--per-expert")["stability"]
    assert (row["layer"], row["rows"], row["moved"], row["cv_rows"]) == ("0", 3, 0.25, pytest.approx(2 / 3))
    assert row["moved_most"] == {"from": "10", "to": "20", "total_variation": 0.5}
    assert (row["busy"], row["busiest"]) == (1, pytest.approx([1, 1, 1 / 3, 1 / 3]))  # ties are all busy


def test_rows_of_one_load_move_by_chance_alone(stats):
    counts = np.random.default_rng(0).multinomial(600, [0.4, 0.3, 0.2, 0.1], 200)
    content = "e0,e1,e2,e3\n" + "".join(",".join(map(str, row)) + "\n" for row in counts.tolist())
    (row,) = stats(content, "--per-expert")["stability"]
    assert row["moved"] == pytest.approx(row["by_chance"], rel=0.1)
    assert row["busiest"][0] > 0.9 and row["busiest"][1] < 0.1
    assert (row["rows"], row["moved_most"]["from"][:4]) == (200, "row ")


def test_rows_of_the_long_form_are_the_same(stats):
    rows = [line.split(",") for line in STEPS.splitlines()[1:]]
    long = "step,layer,expert,count\n" + "".join(
        f"{step},{layer},{e},{x}\n" for step, layer, *counts in rows for e, x in enumerate(counts)
    )
    assert stats(long, "--per-expert")["stability"] == stats(STEPS, "--per-expert")["stability"]
    (without,) = stats(long.replace("step,", "day,", 1), "--per-expert", "--sum", "day")["stability"]
    assert (without["rows"], without["moved_most"]["from"]) == (3, "row 1")  # in the order of the file


def test_single_experts_and_rows_are_printed(capsys, tmp_path):
    (tmp_path / "steps.csv").write_text(STEPS)
    assert main(["routing-stats", str(tmp_path / "steps.csv"), "--per-expert"]) == 0
    out = capsys.readouterr().out
    for words in ("minimum", "3 rows", "2 layers", "by chance", "50.00% from 10 to 20; 0 (100%)", "3.333"):
        assert words in out
    (tmp_path / "steps.csv").write_text("e0,e1\n300,1\n")
    assert main(["routing-stats", str(tmp_path / "steps.csv"), "--per-expert"]) == 0
    assert "the rows give no stability" in capsys.readouterr().out


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
    (moves,) = stats(folder, "--per-expert")["stability"]
    assert (moves["split"], moves["rows"], moves["by_chance"]) == ("train", len(last), None)


@pytest.mark.parametrize("trace", [True, False])
def test_a_run_without_classes_is_read_from_its_trace_or_its_shares(stats, folder, tmp_path, trace):
    for name in ("summary.json", "config.toml", *(["routing.safetensors"] if trace else [])):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["layers"]["moe"].pop("class_expert", None)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    forge(tmp_path)
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
    record = {"split": "eval", "step": 1, "layers": {"moe": layer}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record))
    forge(tmp_path, {"loss": 1, "layers": [{"name": "moe", "top_k": 2}]})
    assert main(["routing-stats", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


# -- what is printed and drawn ---------------------------------------------------------------------


def test_the_terminal_shows_tables_reasons_and_warnings(capsys, tmp_path):
    picture = tmp_path / "heat.svg"
    files = [str(EXAMPLES / name) for name in ("transformer_6_experts.csv", "cifar10_10_experts.csv")]
    assert main(["routing-stats", *files, "--figure", str(picture)]) == 0
    out = capsys.readouterr().out
    for words in (
        *("0.089", "0.998", "466.4", "moved %", "expert 0: 15.58% to 18.52%", "healthy, 4 of 5"),
        *(
            "dead experts, 1 of 5: strengthen",
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


@pytest.mark.parametrize(
    "form", ["experts", *(pytest.param(name, marks=pytest.mark.long) for name in ("labels", "values"))]
)
def test_many_columns_take_seconds(tmp_path, form):
    """50,000 columns: 2 s; compared with each other, as they once were, 40."""
    names = [f"{'e' if form == 'experts' else 'x'}{at}" for at in range(50_000)]
    lines = [names, *([str(at % 3 + (form == "values") * row) for at in range(50_000)] for row in range(2))]
    extra = ["e0,e1", "3,4", "5,6"] if form != "experts" else ["layer", "0", "0"]
    text = "\n".join(f"{start},{','.join(line)}" for start, line in zip(extra, lines, strict=True))
    (tmp_path / "counts.csv").write_text(text)
    began = time.process_time()
    (series, *_), _ = read_counts(tmp_path / "counts.csv")
    assert time.process_time() - began < 15
    assert len(series.count_E) == (50_000 if form == "experts" else 2)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_hundred_thousand_columns_are_refused_at_once(tmp_path, form):
    """Torch and the metrics would take longer than anyone waits, and more memory than a row for each expert."""
    names = ",".join(f"e{at}" for at in range(100_000))
    ones = ",".join("1" * 100_000)
    content = f"layer,{names}\n0,{ones}\n" if form == "csv" else f'[{{"layer": 0, "counts": [{ones}]}}]'
    (tmp_path / "counts").write_text(content)
    began = time.process_time()
    with refused("too-many-columns", tmp_path / "counts", "100,001", "layer, expert and count"):
        read_counts(tmp_path / "counts")
    assert time.process_time() - began < 5


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
        (
            "[{}]",
            "FILE has no counts: it needs columns expert0, expert1, ... or e0, e1, ... or both expert and count, and",
        ),
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


IDS = [np.random.default_rng(at).permutation(16)[:2].tolist() for at in range(300)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("token_id,layer,expert_0,expert_1,expert_2\n0,0,42,156,9\n1,0,12,89,42\n", "looks like the ids of the expert"),
        ("position,expert_0\n0,5\n1,3\n", "looks like the ids of the experts"),
        ("layer,expert_0,expert_1\n" + "".join(f"0,{a},{b}\n" for a, b in IDS), "looks like the ids of the experts"),
        ("token,layer,expert_id\n0,0,3\n", "it looks like ids of chosen experts"),
        ("token,layer,top1,top2\n0,0,3,5\n", "it looks like ids of chosen experts"),
        ('{"topk_ids": [3, 5, 1]}', "it looks like ids of chosen experts"),
        (
            '{"token": 0, "expert_ids": [3, 5]}\n{"token": 1, "expert_ids": [1, 5]}',
            "it looks like ids of chosen experts",
        ),
        ("layer,expert,prob\n0,0,0.3\n0,1,0.7\n", "it looks like scores or probabilities of a router"),
        ("layer,expert_0_prob,expert_1_prob\n0,0.3,0.7\n", "it looks like scores or probabilities of a router"),
        ('{"router_probs": {"0": [0.5, 0.5]}}', "it looks like scores or probabilities of a router"),
        ("token,layer,e0,e1\n0,0,0.3,0.7\n", "looks like router probabilities of tokens"),
        ("e0,e1\n0.3,0.7\n0.2,0.8\n", "looks like router probabilities of tokens"),
        ("layer,e0,e1\n0,10.5,30.25\n", "holds fractions that add up to 40.75 in layer 0, all, not to 1 or 100 %"),
        ("layer,e0,e1\n0,-1.5,2\n", "e0 is '-1.5', and a count is never below 0; negative fractions look like a rou"),
        ("layer,expert,count\n0,1,10\n0,2,30\n", "seems to number its experts from 1 to 2"),
        ("layer;e0;e1\n0;1,234;5\n", "line 2: e0 is '1,234', which may be a fraction or thousands"),
        ("10,30\n20,20\n", "its first line holds numbers, not names"),
        (",e0,e1\n0,3,1\n1,2,2\n", "only column 1 tells its rows apart"),
        ("layer,expert,count\n0,0,3\n,1,1\n", "line 3: the layer is empty; write it in every row"),
        ('"a - expert_0","b - expert_0"\n1,2\n', "counts each expert twice, as in 'a - expert_0' and 'b - expert_0'"),
        ("e0,e00\n1,2\n", "'e0' and 'e00' are both of expert 0; keep one"),
        ("l0_e0,l0_e1,l1_e1\n1,2,3\n", "there is no column for expert 0 of layer 1"),
        ('{"counts":' * 300 + "1" + "}" * 300, "it is nested too deep"),
    ],
)
def test_what_looks_like_something_else_is_refused_by_name(refusal, content, sentence):
    assert sentence in refusal(content)


def archive(*names):
    """A zip archive with members of these names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for name in names:
            members.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (archive("counts.npy"), "is a NumPy archive (.npz)"),
        (archive("archive/data.pkl", "archive/version"), "is a PyTorch file (.pt)"),
        (archive("[Content_Types].xml"), "is an Excel workbook"),
        (gzip.compress(b"layer,e0\n", mtime=0), "is compressed with gzip"),
        (b"\x08\0\0\0\0\0\0\0{}      \0\0\0\0", "is a safetensors file"),
        (b"\x93NUMPY\x01\0v\0", "is a NumPy array (.npy)"),
        (b"PAR1\x15\x04", "is a Parquet file"),
        (b"ab\0\0cd", "is a binary file"),
    ],
)
def test_a_binary_file_is_called_what_it_is(refusal, content, kind):
    sentence = refusal(content)
    assert sentence.startswith(f"FILE {kind}") and "reads CSV, JSON and JSONL text" in sentence


def test_utf_16_is_read_too(stats, tmp_path):
    (tmp_path / "excel.txt").write_bytes("layer\texpert\tcount\r\n0\t0\t3\r\n0\t1\t1\r\n".encode("utf-16"))
    assert loads(stats(tmp_path / "excel.txt")) == {("0", "all"): [3, 1]}


@pytest.mark.parametrize(
    "counts",
    [
        [[total * share for share in (1, 2, 3, 4)] for total in (10, 20, 40) * 30],  # batches of three sizes
        np.random.default_rng(0).multinomial(40, [0.25] * 4, 200).tolist(),
        [[at, 100 - at] for at in (40, 60) * 100],
    ],
)
def test_counts_of_many_rows_are_not_taken_for_ids(stats, counts):
    content = ",".join(f"e{at}" for at in range(len(counts[0]))) + "\n"
    content += "".join(",".join(map(str, row)) + "\n" for row in counts)
    assert loads(stats(content))["0", "all"] == np.sum(counts, axis=0).tolist()


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
