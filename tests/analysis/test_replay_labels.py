"""Labels of a trace, replayed and counted by themselves; and traces of routers that are not plugins."""

import json

import attrs
import pytest
import torch

from moe_engine.analysis.replay import ReplayVariant, recorded, replay
from moe_engine.cli import main

from .test_replay import trace_of

LABELS = ("prose", "code")


@pytest.fixture
def trace():
    """60 tokens, 10 of them padding; label 0 favours the first experts and label 1 the last, -1 is none."""
    logits = torch.randn(60, 6)
    labels = torch.tensor([0, 1, -1]).repeat(20)
    logits[labels == 0, :2] += 2
    logits[labels == 1, 4:] += 2
    trace = trace_of(logits, top_k=2)
    mask = torch.arange(60) < 50
    (layer,) = trace.layers
    layer.forwards = [
        attrs.evolve(forward, labels=labels, mask=mask, selected=forward.selected & mask[forward.token])
        for forward in layer.forwards
    ]
    trace.about["labels"] = list(LABELS)
    return trace


def counted(trace, label):
    """[E] and the number of tokens, in a loop over the recorded choices."""
    (forward,) = trace.layers[0].forwards
    load = torch.zeros(6)
    for token, expert in zip(forward.token.tolist(), forward.expert.tolist(), strict=True):
        if forward.mask[token] and label in (None, int(forward.labels[token])):
            load[expert] += 1
    return load, float(load.sum()) / 2


def test_each_label_has_its_own_load(trace):
    for rows in (recorded(trace, by_label=True), replay(trace, ReplayVariant("topk"), by_label=True)):
        assert [(row["layer"] == "mean", row["label"]) for row in rows] == [
            (mean, label) for mean in (False, True) for label in (None, *LABELS)
        ]
        for row, label in zip(rows[:3], (None, 0, 1), strict=True):
            load, _ = counted(trace, label)
            assert row["load"] == pytest.approx((load / load.sum()).tolist())
            assert (row["agreement"], row["first"]) == (1, 1)
    assert [row["label"] for row in recorded(trace)] == [None, None]


def test_agreement_is_counted_by_label(trace):
    """A bias against the first experts changes the choices of the label that uses them, and few others."""
    (layer,) = trace.layers
    layer.biases = [
        {"level": "expert", "name": "b", "selection_only": True, "value": torch.tensor([-9.0, -9, 0, 0, 0, 0])}
    ]
    _, first, last, *_ = replay(trace, ReplayVariant("topk", "recorded"), by_label=True)
    assert first["agreement"] < 0.5 < last["agreement"] < 1


def test_routing_stats_compares_the_labels_of_a_trace(trace, tmp_path, capsys):
    trace.write(tmp_path / "x.routing")
    assert main(["routing-stats", str(tmp_path / "x.routing"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for row, label in zip(report["rows"], (0, 1), strict=True):
        load, tokens = counted(trace, label)
        assert (row["split"], row["total"], row["tokens"]) == (LABELS[label], load.sum(), tokens)
        assert row["load"] == pytest.approx((load / load.sum()).tolist())
    assert [(one["split"], one["against"]) for one in report["changes"]] == [("code", "prose")]
    trace.layers[0].forwards = [attrs.evolve(forward, labels=None) for forward in trace.layers[0].forwards]
    trace.write(tmp_path / "y.routing")
    assert main(["routing-stats", str(tmp_path / "y.routing")]) == 0
    out = capsys.readouterr().out
    assert "all" in out and "counts of all 60 recorded tokens of each layer" in out


def test_a_trace_without_labels_has_none_to_tell(tmp_path, capsys):
    trace_of(torch.randn(8, 4)).write(tmp_path / "x")
    assert main(["replay", str(tmp_path / "x"), "--by-label"]) == 2
    assert "holds no labels" in capsys.readouterr().err


def test_a_trace_of_a_router_that_is_not_a_plugin_is_shown(tmp_path, capsys):
    """What it recorded, and how to go on; with --routers there is something to compare."""
    trace = trace_of(torch.randn(8, 4))
    trace.layers[0].router = "SomeBlock"
    trace.write(tmp_path / "x")
    assert main(["replay", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert "SomeBlock, recorded" in out and "SomeBlock, is not a plugin; --routers" in out
    assert main(["replay", str(tmp_path / "x"), "--routers", "topk"]) == 0
    assert "is not a plugin" not in capsys.readouterr().out


def test_names_of_labels_that_are_not_a_list(trace):
    trace.about["labels"] = {"0": "x"}
    assert [row["label"] for row in recorded(trace, by_label=True)[:3]] == [None, "0", "1"]
