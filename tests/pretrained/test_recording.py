"""Traces of watched models: their limit, and labels of sequences or tokens."""

import json

import pytest
import torch

from moe_engine import Engine, watch
from moe_engine.cli import main
from moe_engine.run.traces import read_trace
from support import refused

from .tiny import EXPERTS, TOP_K, batch, build, chosen_by_gates, counted, name

# -- the limit -------------------------------------------------------------------------------------------


def test_a_trace_ends_at_its_limit_and_says_so(tmp_path, recwarn, capsys):
    """Two rows of the second forward still fit; of later ones nothing is recorded, though a short one would fit."""
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True, limit=55)
    model(ids, attention_mask=mask)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="reached its limit of 55 tokens of each layer; .* limit=N"):
        model(ids)
    model(ids[:, :1])
    assert not recwarn.list
    watcher.write_routing(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    assert (trace.limit, trace.cut, trace.tokens) == (55, True, 50)
    assert [[forward.shape for forward in layer.forwards] for layer in trace.layers] == [[(3, 10), (2, 10)]] * 2
    assert main(["replay", str(tmp_path / "x")]) == 0
    assert "the first 50 tokens of each layer" in capsys.readouterr().out
    watcher.metrics()
    caught = chosen_by_gates(model)
    model(ids)
    assert torch.equal(watcher.metrics()[name(0)]["load"], counted(caught[0][0][1]))


def test_a_trace_below_its_limit_is_whole(tmp_path):
    model, (ids, _) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True, limit=30)
    model(ids)
    watcher.write_routing(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    assert (trace.limit, trace.cut, trace.tokens) == (30, False, 30)


def test_a_limit_shorter_than_a_sequence_records_nothing(tmp_path):
    model, (ids, _) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True, limit=9)
    with pytest.warns(UserWarning, match="limit of 9 tokens"):
        model(ids)
    with refused("empty-trace", "a single sequence has more tokens than the limit of 9; raise it"):
        watcher.write_routing(tmp_path / "x")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "20", None])
def test_a_limit_that_is_none(limit):
    with refused("bad-limit", repr(limit), "at least 1"):
        watch(Engine("balance"), build("Mixtral"), record=True, limit=limit)


def test_a_trace_says_what_it_is_of(tmp_path, capsys):
    model, (ids, _) = build("Qwen2Moe"), batch()
    watcher = watch(Engine("balance"), model, record=True)
    model(ids)
    watcher.write_routing(tmp_path / "x")
    assert main(["replay", str(tmp_path / "x"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["trace"]
    assert (about["model"], about["blocks"]) == ("Qwen2MoeForCausalLM", ["Qwen2MoeSparseMoeBlock"])
    assert (about["router"], about["tokens"], about["cut"]) == ("topk", 30, False)


# -- labels ----------------------------------------------------------------------------------------------


def pairs(labels, indices_TK, mask):
    """[C, E]: how often real tokens of each class chose each expert, in a loop."""
    table = torch.zeros(3, EXPERTS)
    for label, experts, real in zip(
        labels.flatten().tolist(), indices_TK.tolist(), mask.flatten().tolist(), strict=True
    ):
        for expert in experts if real and label >= 0 else ():
            table[label, expert] += 1
    return table


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
@pytest.mark.parametrize("of", ["sequences", "tokens"])
def test_classes_by_experts(family, of):
    """Padding and tokens labelled -100 are of no class."""
    model, (ids, mask) = build(family), batch()
    per_token = torch.randint(3, (3, 10)) if of == "tokens" else torch.tensor([2, 0, 1])[:, None].expand(3, 10).clone()
    if of == "tokens":
        per_token[1, 3:5] = -100
    labels = per_token if of == "tokens" else per_token[:, 0]
    caught = chosen_by_gates(model)
    watcher = watch(Engine("specialization", classes=3), model, record=True)
    with watcher.labelled(labels):
        model(ids, attention_mask=mask)
    told = watcher.metrics()
    for index in range(2):
        expected = pairs(per_token, caught[index][0][1], mask)
        assert torch.equal(told[name(index)]["class_expert"], expected.double())
        assert told[name(index)]["mutual_information"] >= 0
        assert torch.equal(watcher.trace.layers[index].forwards[0].labels, per_token.flatten())


def test_labels_end_with_their_context():
    """And the ones around it are those before."""
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("specialization", classes=3), model, record=True)
    with watcher.labelled(torch.tensor([0, 1, 2])):
        with watcher.labelled(torch.tensor([1, 1, 1])), pytest.raises(ValueError, match="input_ids"):
            model()
        model(ids, attention_mask=mask)
    model(ids)
    first, second = watcher.trace.layers[0].forwards
    assert first.labels.view(3, 10)[:, 0].tolist() == [0, 1, 2]
    assert second.labels is None
    assert watcher.metrics()[name(0)]["class_expert"].sum() == 26 * TOP_K


@pytest.mark.parametrize("labels", [torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])[:, None].expand(3, 10), 2])
def test_labels_given_at_once_hold_for_every_forward(labels):
    """Until labelled() gives others, and again after it."""
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("specialization", classes=3), model, record=True, labels=labels)
    model(ids, attention_mask=mask)
    with watcher.labelled(1):
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask)
    expected = torch.full((3,), 2) if isinstance(labels, int) else torch.tensor([2, 0, 1])
    first, second, third = (forward.labels.view(3, 10) for forward in watcher.trace.layers[0].forwards)
    assert torch.equal(first, expected[:, None].expand(3, 10)) and torch.equal(third, first)
    assert torch.equal(second, torch.ones_like(second))
    rows = watcher.metrics()[name(0)]["class_expert"].sum(1) / TOP_K  # of 6, 10 and 10 real tokens
    assert rows.tolist() == ([0, 26, 52] if isinstance(labels, int) else [20, 46, 12])


def test_labels_of_sequences_hold_for_generated_tokens():
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("specialization", classes=3), model)
    with watcher.labelled(torch.tensor([0, 1, 1])):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    table = watcher.metrics()[name(0)]["class_expert"]
    assert (table.sum(1) / TOP_K).tolist() == [6 + 2, 20 + 4, 0]


def test_labels_that_can_not_be_used():
    model, (ids, _) = build("Mixtral"), batch()
    with refused("no-classes", "Engine(..., classes=N)"), watch(Engine(), model).labelled(torch.tensor([0])):
        pass
    watcher = watch(Engine("specialization", classes=3), model)
    for labels in ([0, 1, 2], "code", torch.zeros(3), torch.zeros(3, 10, 1, dtype=torch.long), 3, -1, True):
        with refused("bad-labels", "[batch] or [batch, tokens]", "classes=3"), watcher.labelled(labels):
            pass
        with refused("bad-labels", "[batch] or [batch, tokens]"):
            watch(Engine("specialization", classes=3), model, labels=labels)
    with refused("no-classes", "Engine(..., classes=N)"):
        watch(Engine(), model, labels=0)
    for count in (2, 30):
        with refused("labels-do-not-fit", f"[{count}]", "[3, 10]"), watcher.labelled(torch.zeros(count).long()):
            model(ids)
