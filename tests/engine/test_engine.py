"""The engine: its layers, copies of it, its state, and errors that name the plugin."""

import copy

import attrs
import pytest
import torch

from moe_engine import Bias, Engine, Growth, PluginError, RunError, adam, hookimpl, option
from rig import Rig
from support import refused


def test_deep_copies_of_engine_and_model_grow_apart():
    rig = Rig().train(2)
    rig.grow(0)
    pair = copy.deepcopy({"engine": rig.engine, "model": rig.model})
    twin = copy.copy(rig)
    twin.engine, twin.model, twin.layer = pair["engine"], pair["model"], pair["model"][1]
    twin.optimizer = adam(twin.model, 1e-2)
    assert twin.engine.layers == [twin.layer]
    assert twin.engine.growths == rig.engine.growths
    twin.grow(1)
    assert (twin.layer.spec.experts, rig.layer.spec.experts) == (6, 5)
    twin.train(1)
    rig.train(1)
    assert (len(twin.engine.growths), len(rig.engine.growths)) == (2, 1)
    alone = copy.deepcopy(rig.engine)
    assert alone.layers == []
    assert list(alone.plugins.active) == list(rig.engine.plugins.active)
    assert alone.plugins.active["switch_aux"] is not rig.engine.plugins.active["switch_aux"]


def test_a_layer_used_twice_counts_twice_and_grows_once():
    engine = Engine("topk,switch_aux,random", experts=4)
    layer = engine.moe(6, 5, name="moe")
    optimizer = adam(layer, 1e-3)
    x = torch.randn(8, 6)
    (layer(layer(x)).square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    once = layer.sums.step.grad.clone()
    assert once[0] == 16
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()
    record = engine.grow(Growth("moe", (0,)), optimizer, probe=lambda: layer.eval()(layer(x)).mean())
    assert (record.after, layer.train()(layer(x)).shape) == (5, (8, 6))


def test_what_a_state_dict_holds_are_copies():
    rig, other = Rig().train(2), Rig().train(1)
    state = rig.engine.state_dict()
    window = state["layers"]["moe"]["since_log"].clone()
    other.engine.load_state_dict(state)
    rig.train(1)
    other.train(2)
    assert torch.equal(state["layers"]["moe"]["since_log"], window)
    odd = Rig("topk,saturation,random")
    with refused("state-of-other-layer", "moe"):
        odd.engine.load_state_dict(state)


def test_metrics_begin_anew_with_a_growth():
    """Numbers of four and of five experts do not add up."""
    rig = Rig().train(3)
    rig.grow(0)
    assert rig.engine.metrics() == {}
    rig.train(1)
    assert len(rig.engine.metrics()["moe"]["load"]) == 5


def test_two_metrics_of_one_name_are_an_error_that_names_both(install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_metrics(self, stats):
            return {"cv": 0.0}

    install("metric", "mine", Mine)
    engine = Engine("mine", experts=4)
    layer = engine.moe(3, 4).eval()
    layer(torch.randn(5, 3))
    with refused("duplicate-metric", "'cv'", "mine and balance", kind=RunError):
        engine.metrics("eval")


SPOILED = {  # what a metric does to what it is handed
    "sums": lambda stats, layer, probe: stats.load.zero_(),
    "names of sums": lambda stats, layer, probe: stats.sums.clear(),
    "sums by way of numpy": lambda stats, layer, probe: stats.load.numpy().fill(0.0),
    "weights": lambda stats, layer, probe: next(layer.parameters()).detach().add_(1.0),
    "routing": lambda stats, layer, probe: probe.probs.detach().zero_(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_metric_changes_nothing_that_another_one_reads(install, spoil):
    """It gets sums of its own; whatever else it changes in place, it is named."""

    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_metrics(self, stats, layer, probe):
            spoil(stats, layer, probe)
            return {}

    install("metric", "mine", Mine)
    rigs = [Rig(f"{first}topk,saturation,switch_aux,split").train(2) for first in ("mine,", "")]
    if spoil in (SPOILED["weights"], SPOILED["routing"]):
        with refused("changed-in-place", "metric 'mine'", "clone", kind=RunError):
            rigs[0].engine.metrics("train", rigs[0].probe)
    else:
        spoiled, whole = (rig.engine.metrics("train", rig.probe)["moe"] for rig in rigs)
        assert repr(spoiled) == repr(whole)


def test_a_plugin_that_fails_in_a_layer_is_named(install):
    @attrs.define(eq=False)
    class Mine:
        weight: float = option(1.0, help="coefficient")

        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.nothing

    install("loss", "mine", Mine)
    with refused("layer-not-built", "loss 'mine' (elsewhere 1.0) in moe_aux_loss", "Attr", kind=PluginError):
        Engine("mine", experts=4).moe(3, 4)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda routing: routing.load.sum(), "does not depend on the router"),
        (lambda routing: routing.probs, "is of shape [4, 8], not a scalar"),
    ],
)
def test_a_loss_that_can_teach_nothing_is_refused(install, answer, sentence):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_aux_loss(self, routing):
            return answer(routing)

    install("loss", "mine", Mine)
    with refused("bad-loss-term", f"loss 'mine' {sentence}"):
        Engine("mine").moe(3, 4)


def test_a_bias_that_finds_nothing_to_shift_is_refused(install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_bias(self, level):
            return None

    install("bias", "mine", Mine)
    with refused("acts-on-nothing", "bias 'mine'"):
        Engine("mine").moe(3, 4)


def test_a_bias_of_the_wrong_size_is_refused_with_its_own_name(install):
    class Three(Bias):
        def forward(self):
            return torch.zeros(3)

    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_bias(self, level):
            return Three()

    install("bias", "mine", Mine)
    with refused("bias-wrong-shape", "bias 'mine'", "[3]", "8 units", kind=PluginError):
        Engine("mine").moe(3, 4)
