"""Routers that pass something on from layer to layer, explicitly; and the kit, which catches those that hide it."""

import importlib.util
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_engine import Engine, Growth, LinearRouter, adam, assign, hookimpl
from moe_engine.cli import main
from moe_engine.testing import checks, results
from support import refused

FILE = Path(__file__).parents[2] / "examples" / "recurrent_router.py"


@pytest.fixture
def recurrent(install):
    spec = importlib.util.spec_from_file_location("recurrent_router", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    install("router", "recurrent", module.Recurrent)
    return module.Recurrent


@pytest.fixture
def three(recurrent):
    torch.manual_seed(0)
    engine = Engine("recurrent,saturation,switch_aux", ["recurrent.width=5"], experts=4)
    return engine, nn.ModuleList(engine.moe(6, 8, name=f"l{index}") for index in range(3))


def run(layers, x, wrap=lambda layer, *given: layer(*given)):
    carried = None
    for layer in layers:
        y, carried = wrap(layer, x, None, None, None, carried)
        x = x + y
    return x, carried


def gradients(engine, layers, x, wrap):
    layers.zero_grad()
    y, carried = run(layers, x, wrap)
    (y.square().mean() + carried.square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    return [p.grad.clone() for p in layers.parameters()]


def test_what_a_layer_passes_on_reaches_the_next_router(three):
    _, layers = three
    x = torch.randn(2, 7, 6)
    y, carried = layers[0](x)
    assert (y.shape, carried.shape) == ((2, 7, 6), (2, 7, 5))
    first = layers[1].route(layers[1].tokens(x))
    then = layers[1].route(layers[1].tokens(x, carried=carried))
    assert not torch.equal(first.probs, then.probs)
    h = layers[0].router.cell(layers[0].router.project(x.flatten(0, 1)), torch.zeros(14, 5))
    torch.testing.assert_close(carried.flatten(0, 1), h)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    assert layers[0](x, mask)[1][1, 3:].abs().sum() == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_checkpointing_and_compile_change_no_gradient(three, backend):
    engine, layers = three
    layers = layers[:2]
    engine.attach(layers)
    x = torch.randn(9, 6)
    expected = gradients(engine, layers, x, lambda layer, *given: layer(*given))
    again = gradients(engine, layers, x, lambda layer, *given: checkpoint(layer, *given, use_reentrant=False))
    torch.testing.assert_close(again, expected)
    torch._dynamo.reset()
    whole = torch.compile(lambda x: run(layers, x), fullgraph=True, backend=backend)
    layers.zero_grad()
    y, carried = whole(x)
    (y.square().mean() + carried.square().mean() + engine.aux_loss()).backward()
    torch.testing.assert_close([p.grad for p in layers.parameters()], expected)


def test_growth_leaves_what_is_carried_alone(three):
    engine, layers = three
    optimizer, x = adam(layers, 1e-3), torch.randn(9, 6)
    _, before = layers[0].eval()(x)
    engine.grow(Growth("l0", (1,)), optimizer)
    assert torch.equal(layers[0](x)[1], before)
    assert run(layers.train(), x)[0].shape == (9, 6)


@pytest.mark.parametrize(
    ("router", "given", "code"),
    [("topk", torch.zeros(9, 5), "nothing-is-carried"), ("recurrent", torch.zeros(9, 4), "carried-of-wrong-shape")],
)
def test_what_does_not_fit_is_refused(recurrent, router, given, code):
    layer = Engine(router, [f"{router}.width=5"] if router == "recurrent" else [], experts=4).moe(6, 8)
    with refused(code, "carried"):
        layer(torch.randn(9, 6), carried=given)


def test_the_example_passes_the_kit_and_trains_a_language_model(recurrent, tmp_path):
    slow = ("experts_can_be_added_and_removed", "compiles")
    several = [check for check in checks("recurrent") if check.claim.name not in slow]
    assert [one.why for one in results(several) if one.outcome == "FAILED"] == []
    words = ["--task", "lm", "--set", "lm.every=1", "--steps", "4", "--no-plugin", "plots,html", "--quiet"]
    assert main(["run", "--plugins", "recurrent,switch_aux", *words, "--out", str(tmp_path / "run")]) == 0


class Hidden(LinearRouter):
    """Adds the last layer's logits, kept on the plugin."""

    def __init__(self, spec, memory):
        super().__init__(spec)
        self.memory = memory

    def score(self, tokens):
        (logits_TE,) = super().score(tokens)
        last = self.memory.get("last")
        usable = last is not None and last.shape == logits_TE.shape
        self.memory["last"] = logits_TE.detach()
        return (logits_TE + last if usable else logits_TE,)

    def select(self, tokens, levels):
        probs_TE = levels[0].biased.softmax(-1)
        expert_TK = levels[0].select_by(probs_TE).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)


def test_the_kit_catches_state_that_is_kept_elsewhere():
    @attrs.define(eq=False)
    class Remembers:
        memory: dict = attrs.field(factory=dict, init=False)

        @hookimpl
        def moe_router(self, spec):
            return Hidden(spec, self.memory)

    (check,) = [check for check in checks(Remembers) if check.claim.name == "recomputed_layers_keep_apart"]
    (found,) = results([check])
    assert found.outcome == "FAILED" and "a router that passes values on declares carries" in found.why
