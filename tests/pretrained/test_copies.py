"""Copies and pickles of a watched model: they work, hold nothing of the watcher, and count nowhere."""

import copy
import io
import pickle

import pytest
import torch

from moe_engine import Engine, watch

from .tiny import ALL, batch, build, chosen_by_gates, counted, name


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "a copy of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_a_copy_computes_the_same_and_counts_nowhere(family, copied):
    model, (ids, mask) = build(family), batch()
    expected = model(ids, attention_mask=mask).logits
    watcher = watch(Engine("balance"), model, record=True)
    twin = copied(model)
    assert torch.equal(twin(ids, attention_mask=mask).logits, expected)
    assert {told["verdict"].name for told in watcher.metrics().values()} == {"no data"}
    assert not any(layer.forwards for layer in watcher.trace.layers)


def test_a_pickle_does_not_grow_with_what_was_recorded():
    model, (ids, mask) = build("Mixtral"), batch()
    watcher = watch(Engine("balance"), model, record=True)
    before = len(pickle.dumps(model))
    for _ in range(5):
        model(ids, attention_mask=mask)
    assert len(pickle.dumps(model)) == before
    watcher.close()
    assert before - len(pickle.dumps(model)) < 2000


@ALL
def test_a_copy_is_watched_by_itself(family):
    model, (ids, mask) = build(family), batch()
    watcher = watch(Engine("balance"), model)
    twin = copy.deepcopy(model)
    caught, other = chosen_by_gates(twin), watch(Engine("balance"), twin)
    twin(ids, attention_mask=mask)
    assert torch.equal(other.metrics()[name(0)]["load"], counted(caught[0][0][1], mask))
    model(ids)
    assert other.metrics()[name(0)]["verdict"].name == "no data"
    assert watcher.metrics()[name(0)]["load"].sum() == pytest.approx(1)


def test_an_average_of_the_weights_counts_nowhere():
    """It copies the model."""
    model, (ids, mask) = build("Qwen3Moe"), batch()
    watcher = watch(Engine("balance"), model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average(ids, attention_mask=mask)
    assert watcher.metrics()[name(0)]["verdict"].name == "no data"
