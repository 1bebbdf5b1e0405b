"""The estimate of what training needs: exact for weights, by parts that are trained, and refused if it is too much."""

import pytest

from moe_engine import Engine, PretrainedLM, adopt, train_only, training_memory, upcycle
from moe_engine.pretrained import training_memory as module
from moe_engine.testing import tiny_checkpoint
from support import refused

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("memory")
    return {name: tiny_checkpoint(place / name, name, num_hidden_layers=2) for name in ("mixtral", "llama")}


@pytest.mark.parametrize("train", ["all", "moe"])
def test_weights_gradients_and_moments_are_those_of_the_model(folders, train):
    """4 bytes of each weight; 4 and 8 of each trained one."""
    language = PretrainedLM.open(folders["mixtral"])
    needed = training_memory(language, train=train, tokens=0)
    model, engine = language.load(), Engine()
    adopt(engine, model)
    trained = train_only(engine, model, train)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert [needed.weights, needed.gradients, needed.moments] == [4 * weights, 4 * trained, 8 * trained]


def test_upcycled_weights_count_once_per_expert(folders):
    """All but the routers, which are made with the layers."""
    language = PretrainedLM.open(folders["llama"])
    needed = training_memory(language, train="all", tokens=0, experts=4, layers=[1], top_k=2)
    model, engine = language.load(), Engine()
    upcycle(engine, model, experts=4, layers=[1])
    router = engine.layers[0].router.weight.numel()
    assert needed.weights == 4 * (sum(parameter.numel() for parameter in model.parameters()) - router)


def test_recomputing_needs_less_for_a_batch_and_not_for_a_probe(folders):
    language = PretrainedLM.open(folders["mixtral"])
    whole, less, probed = (
        training_memory(language, train="all", tokens=4096, **more).activations
        for more in ({}, {"recompute": True}, {"recompute": True, "probed": 4096})
    )
    assert less < whole == probed


def test_what_does_not_fit_is_refused_with_advice(folders, monkeypatch):
    needed = training_memory(PretrainedLM.open(folders["mixtral"]), train="all", tokens=1000)
    monkeypatch.setattr(module, "free_memory", lambda device: needed.total - 1)
    with refused("not-enough-memory", "main memory", "lower it, or buy more"):
        needed.check("cpu", ["lower it", "buy more"])
    monkeypatch.setattr(module, "free_memory", lambda device: needed.total)
    needed.check("cpu", [])
