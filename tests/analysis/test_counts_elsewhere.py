"""Files of routing counts as other tools write them: read right, or refused with what they look like."""

import json
from pathlib import Path

import pytest

from moe_engine.cli import main

LONG = "layer_id,expert_id,count,share\n0,0,30,0.75\n0,1,10,0.25\n1,0,20,0.5\n1,1,20,0.5\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(text, capsys, name="counts.csv", *words):
    """The rows of the answer as JSON."""
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["routing-stats", name, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def found(text, capsys, name="counts.csv"):
    answer = rows(text, capsys, name)
    series = answer["rows"] if isinstance(answer, dict) else answer
    return {str(one["layer"]): round(one["cv"], 3) for one in series}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("counts.csv", LONG),
        ("counts.csv", "# made by a tool\n" + LONG + "# end\n"),
        ("counts.csv", LONG.replace(",", ";")),
        ("counts.tsv", LONG.replace(",", "\t")),
        ("counts.csv", "\ufeff" + LONG.replace("\n", "\r\n")),
        ("counts.csv", "Share,Count,Expert_ID,Layer_Index\n.75,30,0,0\n.25,10,1,0\n.5,20,0,1\n.5,20,1,1\n"),
        ("counts.json", json.dumps({"0": {"0": 30, "1": 10}, "1": {"0": 20, "1": 20}})),
        (
            "counts.json",
            json.dumps([{"layer_index": n, "expert_counts": c} for n, c in enumerate([[30, 10], [20, 20]])]),
        ),
    ],
    ids=["a share next to counts", "comments", "semicolons", "tabs", "Windows", "capitals", "nested", "records"],
)
def test_the_usual_forms_are_read(name, text, capsys):
    assert found(text, capsys, name) == {"0": 0.5, "1": 0.0}


def test_layers_may_be_wide_rows(capsys):
    assert found("layer_id,expert_0,expert_1\n0,30,10\n1,20,20\n", capsys) == {"0": 0.5, "1": 0.0}


def refused(text, capsys, name="counts.csv"):
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["routing-stats", name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_ids_of_chosen_experts_are_no_counts(capsys):
    lines = [f"{token},{layer},{token % 7},{7 + token % 5}" for token in range(40) for layer in (0, 1)]
    err = refused("token,layer_id,expert_0,expert_1\n" + "\n".join(lines) + "\n", capsys)
    assert "ids of the experts" in err


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("counts.npz", b"PK\x03\x04" + bytes(40), "zip"),
        ("counts.csv.gz", b"\x1f\x8b\x08" + bytes(40), "gzip"),
        ("counts.pt", b"\x80\x04\x95" + bytes(40), "pickle"),
    ],
)
def test_a_binary_file_is_told_what_it_is(name, content, what, capsys):
    err = refused(content, capsys, name)
    assert what in err.lower() and "reads CSV, JSON and JSONL" in err


def test_numbers_per_expert_on_demand(capsys):
    Path("counts.csv").write_text("step,expert_0,expert_1\n1,30,10\n2,10,30\n3,20,20\n")
    assert main(["routing-stats", "counts.csv", "--per-expert"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("sum", "mean", "min", "max", "range"))
    line = next(line.split() for line in out.splitlines() if "60" in line.split())
    assert {"60", "20", "10", "30"} <= set(line)
