"""Metrics: published golden values, extremes, and verdicts."""

import math

import attrs
import pytest
import torch

from moe_engine import Engine, Spec, Stats
from moe_engine.plugins.metrics.attribution import Attribution
from moe_engine.plugins.metrics.balance import Balance
from moe_engine.plugins.metrics.health import Health
from moe_engine.plugins.metrics.specialization import mutual_information

# Published routing counts and the values (population statistics over all experts) that follow from them:
# cv, cv2, gini, entropy, max_min, maxvio
GOLDEN = {
    "train 1": (
        [209087, 197354, 235068, 239956, 252595, 208220],
        0.088946,
        0.007911,
        0.049343,
        0.997795,
        1.279908,
        0.129101,
    ),
    "train 2": (
        [246614, 197009, 219858, 225933, 250620, 205966],
        0.087162,
        0.007597,
        0.049043,
        0.997879,
        1.272125,
        0.117177,
    ),
    "validation 1": ([5688, 4629, 4600, 5676, 5516, 4611], 0.099563, 0.009913, 0.051660, 0.997232, 1.236522, 0.110937),
    "validation 2": ([5538, 4318, 5339, 4762, 6003, 4760], 0.110005, 0.012101, 0.061502, 0.996630, 1.390227, 0.172461),
    "flat usage": (
        [55.97, 23.44, 7.81, 5.47, 3.91, 1.56, 0.78, 0.78, 0.16, 0.12],
        *(1.670919, 2.791970, 0.717180, 0.568362, 466.416667, 4.597000),
    ),
}


def balance(load, dropped=None):
    load = torch.tensor(load, dtype=torch.float64)
    sums = {
        "tokens": load.sum().view(1),
        "load": load,
        "dropped": torch.zeros_like(load) if dropped is None else dropped,
    }
    return Balance().moe_metrics(Stats(Spec(1, 1, experts=len(load), top_k=1), sums))


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_values_of_published_counts(row):
    counts, *expected = GOLDEN[row]
    got = balance(counts)
    assert [round(float(got[name]), 6) for name in ("cv", "cv2", "gini", "entropy", "max_min", "maxvio")] == expected


def test_an_even_load():
    got = balance([5, 5, 5, 5])
    assert [float(got[n]) for n in ("cv", "gini", "entropy", "max_min", "maxvio")] == [0, 0, 1, 1, 0]
    assert got["active"] == 4


@pytest.mark.parametrize(("experts", "used"), [(8, 1), (8, 2), (4, 3)])
def test_a_load_on_k_of_e_experts(experts, used):
    got = balance([1] * used + [0] * (experts - used))
    ratio = experts / used
    expected = [math.sqrt(ratio - 1), ratio - 1, 1 - used / experts, math.log(used) / math.log(experts), ratio - 1]
    assert [float(got[n]) for n in ("cv", "cv2", "gini", "entropy", "maxvio")] == pytest.approx(expected)
    assert got["max_min"] == math.inf
    assert got["active"] == used


def test_active_means_a_tenth_of_the_mean():
    assert balance([100, 100, 9, 11])["active"] == 4  # mean 55: the limit is 5.5
    assert balance([100, 100, 1, 11])["active"] == 3


def test_dropped_is_a_share_of_the_assignments():
    assert balance([6, 2], torch.tensor([2.0, 0.0]))["dropped"] == 0.25


def test_mutual_information_of_independent_and_one_to_one_tables():
    assert mutual_information(torch.full((4, 4), 1000.0)) == 0
    assert float(mutual_information(torch.eye(4) * 10_000)) == pytest.approx(1, abs=1e-3)


def test_mutual_information_takes_its_own_bias_off():
    """A random table of 400 counts looks informative by (C-1)(E-1)/2N; without that it is near zero."""
    pairs = torch.randint(100, (400,))
    counts = torch.bincount(pairs, minlength=100).view(10, 10).double()
    joint = counts / counts.sum()
    naive = float(
        (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()).nan_to_num().sum() / math.log(10)
    )
    assert naive > 0.04
    assert float(mutual_information(counts)) < 0.02


def judge(load, top_k=1, tokens=10_000, **more):
    return Health().judge(torch.tensor(load, dtype=torch.float64), top_k, tokens, **more)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        ([5, 5, 6, 5, 4, 5, 5, 5], "healthy"),
        ([9, 1, 9, 1, 9, 1, 9, 1], "imbalanced"),
        ([9, 9, 9, 9, 9, 9, 9, 0.1], "dead experts"),
        ([99, 0, 0, 1, 0, 0, 0, 0], "collapsed"),
    ],
)
def test_verdicts(load, name):
    finding = judge(load)
    assert finding.name == name
    assert finding.severity == {"healthy": 0, "imbalanced": 1}.get(name, 2)
    assert bool(finding.advice) == (name != "healthy")


def test_flapping_that_the_whole_hides_is_oscillation():
    even = [5] * 8
    assert judge(even, forward_cv=1.0, forwards=10).name == "oscillating"
    assert judge(even, forward_cv=0.1, forwards=10).name == "healthy"


def test_chance_is_no_imbalance():
    """40 tokens on 8 experts differ by chance alone."""
    load = torch.bincount(torch.randint(8, (40,)), minlength=8).double().clamp(min=1)
    assert Health(imbalance=0.0).judge(load, 1, 40).name == "healthy"


def test_no_data_is_no_verdict():
    layer_spec = Spec(1, 1, experts=4)
    nothing = Stats(layer_spec, {"tokens": torch.ones(1), "load": torch.zeros(4), "dropped": torch.zeros(4)})
    assert Health().moe_metrics(nothing) == {}


class Gone:
    """Effects as `Attribution` reads them."""

    task, losses, biases = 2.0, {"weak": 1e-6, "strong": 1.0}, {"idle": 0.0, "busy": 0.2}


def test_attribution_names_terms_without_effect():
    layer = Engine("topk", experts=4).moe(4, 4)
    got = Attribution().moe_metrics(Gone(), layer)
    assert {n: v for n, v in got.items() if n.startswith("effect.")} == {
        "effect.weak": 5e-7,
        "effect.strong": 0.5,
        "effect.idle": 0.0,
        "effect.busy": 0.2,
    }
    named = {n: v for n, v in got.items() if n.startswith("inert.")}
    assert list(named) == ["inert.weak", "inert.idle"]
    assert "loss weak had no effect" in named["inert.weak"].why
    assert "bias idle had no effect" in named["inert.idle"].why


def test_effects_are_the_gradients_at_the_logits():
    engine = Engine("topk,switch_aux,loss_free", ["switch_aux.weight=0.5"], experts=4)
    layer = engine.moe(6, 8).eval()
    layer.biases[0]["loss_free"].b[:] = torch.tensor([3.0, 0.0, 0.0, -3.0])
    x = torch.randn(30, 6)
    ((routing, effects),) = engine.probe(lambda: layer(x).square().mean()).values()
    logits = routing.levels[0].logits
    aux = 0.5 * layer.aux_terms(routing)["switch_aux"]
    expected = torch.autograd.grad(aux, logits)[0].norm()
    assert effects.losses == {"switch_aux": pytest.approx(float(expected))}
    free = logits.topk(2).indices
    moved = sum(
        len(set(a.tolist()) - set(b.tolist())) for a, b in zip(routing.plan.expert.view(30, 2), free, strict=True)
    )
    assert effects.biases == {"loss_free": pytest.approx(moved / 60)}
    assert moved > 0


def test_a_probe_counts_nothing_and_keeps_no_gradient():
    engine = Engine("topk,saturation,switch_aux", experts=4)
    layer = engine.moe(6, 8).eval()
    engine.probe(lambda: layer(torch.randn(5, 6)).sum())
    assert engine.metrics("eval") == {}
    assert all(p.grad is None for p in layer.parameters())
    assert layer.watched is None


def test_specialization_counts_classes_by_expert():
    engine = Engine("topk", experts=4, top_k=1)
    layer = engine.moe(4, 8, classes=2).eval()
    with torch.no_grad():
        layer.router.rows[:] = torch.eye(4)
    layer(torch.eye(4)[[0, 0, 1, 3]], labels=torch.tensor([0, 0, 1, 1]))
    table = engine.metrics("eval")["moe0"]["class_expert"]
    assert table.tolist() == [[2, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 7), (5, 4), (4, 3), (2, 1)])
def test_an_even_load_is_healthy_for_every_k(experts, top_k):
    assert judge([100] * experts, top_k).name == "healthy"


def test_a_probe_of_a_compiled_model_sees_what_the_eager_one_sees():
    engine = Engine("topk,switch_aux,saturation", experts=4)
    layer = engine.moe(6, 8).eval()
    x = torch.randn(30, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    ((_, eager),) = engine.probe(lambda: layer(x).square().mean()).values()
    ((_, traced),) = engine.probe(lambda: compiled(x).square().mean()).values()
    assert eager == traced
    assert eager.task > 0


def test_a_router_that_is_noisy_in_training_is_compared_with_itself(install):
    from moe_engine import LinearRouter, assign, hookimpl

    class Noisy(LinearRouter):
        def select(self, tokens, levels):
            scores = levels[0].select_by(levels[0].biased)
            chosen = (scores + self.training * torch.randn_like(scores)).topk(self.top_k).indices
            probs = levels[0].biased.softmax(-1)
            return probs, assign(probs.gather(-1, chosen), chosen, tokens)

    @attrs.define(eq=False)
    class Plugin:
        @hookimpl
        def moe_router(self, spec):
            return Noisy(spec)

    install("router", "noisy", Plugin)
    engine = Engine("noisy,saturation", ["saturation.beta=0"], experts=8)
    layer = engine.moe(6, 8)

    def held_out():
        layer.eval()
        loss = layer(torch.randn(200, 6)).square().mean()
        layer.train()
        return loss

    ((_, effects),) = engine.probe(held_out).values()
    assert effects.biases == {"saturation": 0.0}
    assert layer.training
