"""Metrics: published golden values, extremes, and verdicts."""

import functools
import math

import attrs
import numpy as np
import pytest
import torch

from moe_engine import (
    Engine,
    ModuleBank,
    Part,
    Spec,
    Stats,
    Traits,
    UsageError,
    hookimpl,
    linear_cka,
    mutual_information,
    option,
    uniform,
)
from moe_engine.plugins.metrics.attribution import Attribution
from moe_engine.plugins.metrics.balance import Balance
from moe_engine.plugins.metrics.churn import Churn
from moe_engine.plugins.metrics.confidence import Confidence
from moe_engine.plugins.metrics.health import Health
from moe_engine.plugins.metrics.output_similarity_cka import OutputSimilarityCKA
from moe_engine.plugins.metrics.router_saturation import RouterSaturation
from moe_engine.plugins.metrics.weight_similarity import WeightSimilarity, expert_weights

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


def balance(load, dropped=None, levels=None):
    load = torch.tensor(load, dtype=torch.float64)
    sums = {
        "tokens": load.sum().view(1),
        "load": load,
        "dropped": torch.zeros_like(load) if dropped is None else dropped,
        **(levels or {}),
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


def test_a_routers_further_levels_have_a_cv_of_their_own():
    """Groups with loads 3 and 1: mean 2, deviation 1."""
    got = balance(
        [2, 1, 1, 0], levels={"load.expert": torch.tensor([2.0, 1, 1, 0]), "load.group": torch.tensor([3.0, 1])}
    )
    assert {name: float(value) for name, value in got.items() if name.startswith("cv.")} == {"cv.group": 0.5}


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


def test_the_cv_of_single_forwards_is_summed():
    """All of 8 tokens go to one of two experts, then all of 4: cv 1 twice. A forward of padding is none."""
    layer = Engine("topk", experts=2, top_k=1).moe(3, 4)
    for count in (8, 4):
        routing = layer.route(layer.tokens(torch.randn(count, 3)))
        routing.load = torch.tensor([0.0, count])
        assert Health().moe_measure(routing, layer) == {"cv": torch.ones(1), "forwards": torch.ones(1)}
    padding = layer.route(layer.tokens(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool)))
    assert Health().moe_measure(padding, layer) == {"cv": torch.zeros(1), "forwards": torch.zeros(1)}


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

    task, losses, biases, spreads = 2.0, {"weak": 1e-6, "strong": 1.0}, {"idle": 0.0, "busy": 0.2}, {"busy": 0.5}


def test_attribution_names_terms_without_effect():
    layer = Engine("topk", experts=4).moe(4, 4)
    probe = layer.route(layer.tokens(torch.randn(3, 4)))
    got = Attribution().moe_metrics(Gone(), layer, probe)
    assert {n: v for n, v in got.items() if n.startswith("effect.")} == {
        "effect.weak": 5e-7,
        "effect.strong": 0.5,
        "effect.idle": 0.0,
        "effect.busy": 0.2,
    }
    named = {n: v for n, v in got.items() if n.startswith("inert.")}
    assert list(named) == ["inert.weak", "inert.idle"]
    assert "loss weak had no effect on this layer's router: its gradient there is 5.0e-07" in named["inert.weak"].why
    assert "bias idle had no effect" in named["inert.idle"].why
    assert "raise its strength" in named["inert.idle"].advice
    for level in probe.levels:
        level.scores = None  # as if the router had not called select_by
    (deaf,) = [v for n, v in Attribution().moe_metrics(Gone(), layer, probe).items() if n == "inert.idle"]
    assert "the router never calls level.select_by(scores)" in deaf.advice


def test_a_loss_that_acts_on_an_earlier_layer_only_is_said_to_have_no_effect_on_this_router(install):
    @attrs.define(eq=False)
    class OnInput:
        weight: float = option(1.0, help="coefficient")

        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.tokens.x.square().mean() + 0 * routing.levels[0].logits.sum()

    install("loss", "on_input", OnInput)
    engine = Engine("topk,on_input", experts=4)
    first, second = (engine.moe(6, 8).eval() for _ in range(2))
    x = torch.randn(30, 6)
    probed = engine.probe(lambda: second(first(x)).square().mean())
    routing, effects = probed[second]
    term = second.aux_terms(routing)["on_input"]
    assert torch.autograd.grad(term, first.router.weight, retain_graph=True)[0].any()
    why = Attribution().moe_metrics(effects, second, routing)["inert.on_input"].why
    assert why.startswith("loss on_input had no effect on this layer's router: its gradient there is 0.0e+00 of")


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
        layer.router.weight[:] = torch.eye(4)
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


def test_balance_of_a_router_that_assigns_nothing_is_its_share_of_the_mass():
    sums = {"tokens": torch.tensor([4.0]), "load": torch.zeros(2), "dropped": torch.zeros(2)}
    got = Balance().moe_metrics(Stats(Spec(1, 1, experts=2), {**sums, "prob": torch.tensor([3.0, 1.0])}))
    assert {name: value.tolist() for name, value in got.items()} == {"mass": [0.75, 0.25]}


# -- what changes over time ------------------------------------------------------------------------------


@functools.cache
def chooser(experts, top_k):
    """(engine, a layer whose raw logits are its input)."""
    engine = Engine("co_activation" if top_k > 1 else "topk", experts=experts, top_k=top_k)
    layer = engine.moe(experts, 4).eval()
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(experts)
    return engine, layer


def wish(experts, of):
    """Logits of tokens that choose these experts, a tuple each."""
    logits = torch.zeros(len(experts), of)
    for token, own in zip(logits, experts, strict=True):
        token[list(own)] = 9.0
    return logits


def chose(*experts, of=4, mask=None):
    """The routing of tokens that chose these experts."""
    _, layer = chooser(of, len(experts[0]))
    return layer.route(layer.tokens(wish(experts, of), mask))


def test_churn_is_the_share_of_choices_that_changed():
    memory = {}
    assert math.isnan(Churn().moe_metrics(chose((0, 1), (2, 3)), memory)["churn"])
    assert Churn().moe_metrics(chose((1, 0), (2, 3)), memory) == {"churn": 0}  # another order is no change
    assert Churn().moe_metrics(chose((0, 1), (0, 3)), memory) == {"churn": 0.25}
    assert Churn().moe_metrics(chose((2, 3), (1, 2)), memory) == {"churn": 1}
    assert Churn().moe_metrics(None, memory) == {}


def test_churn_of_random_choices_is_chance():
    """1 - K / E = 0.75; a deviation of 0.02 is four standard deviations of 4000 choices."""
    memory = {}
    for _ in range(2):
        routing = chose(*[tuple(torch.randperm(8)[:2].tolist()) for _ in range(2000)], of=8)
        got = Churn().moe_metrics(routing, memory)
    assert got["churn"] == pytest.approx(0.75, abs=0.03)


def test_churn_leaves_padding_out_and_begins_anew_with_another_batch():
    mask, memory = torch.tensor([True, False]), {}
    Churn().moe_metrics(chose((0,), (1,), mask=mask), memory)
    assert Churn().moe_metrics(chose((0,), (2,), mask=mask), memory) == {"churn": 0}
    assert math.isnan(Churn().moe_metrics(chose((0,), (2,), (3,)), memory)["churn"])


def saturation(memory, *experts):
    return RouterSaturation().moe_metrics(chose(*experts), memory)


def test_router_saturation_is_the_overlap_of_earlier_choices_with_those_of_now():
    memory = {}
    first = saturation(memory, (0, 1), (2, 3))
    assert math.isnan(first["router_saturation"])
    assert first["router_saturation_curve"].tolist() == []
    saturation(memory, (0, 1), (1, 3))
    saturation(memory, (2, 3), (0, 1))
    last = saturation(memory, (0, 1), (1, 2))
    assert last["router_saturation_curve"].tolist() == [[1, 0.75], [2, 0.75], [3, 0.25]]
    assert float(last["router_saturation"]) == pytest.approx(7 / 12)


def test_router_saturation_keeps_at_most_64_evenly_spaced_points():
    """Point n chose expert n mod 4: so each remembered point is known by its overlap."""
    memory = {}
    for point in range(1, 301):
        curve = saturation(memory, (point % 4,))["router_saturation_curve"]
        assert [float(overlap) for _, overlap in curve] == [float(at % 4 == point % 4) for at, _ in curve]
        assert len(memory["points"]) <= 64
    assert memory["points"].tolist() == list(range(8, 301, 8))


# -- confidence ------------------------------------------------------------------------------------------


def sure(logits, router="topk", mask=None, **spec):
    engine = Engine([router, "loss_free", "confidence"], experts=logits.shape[-1], **spec)
    layer = engine.moe(logits.shape[-1], 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(logits.shape[-1])
    layer.biases[0]["loss_free"].b[1] = 0.5
    got = Confidence().moe_metrics(layer.route(layer.tokens(logits, mask)), layer)
    assert layer.router.training
    return {name: float(value) for name, value in got.items()}


def test_confidence_is_the_mean_largest_probability_and_the_margin_of_the_choice():
    """Selection sees 0.5 more of expert 1: 3, 2.5, 1 and 2, 1.5, 1.4; K = 2."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.4, 1.0, 2.0], [9.0, 0.0, 0.0]])
    p = np.exp(logits[:2].numpy()) / np.exp(logits[:2].numpy()).sum(-1, keepdims=True)
    got = sure(logits, mask=torch.tensor([True, True, False]), top_k=2)
    assert got["confidence"] == pytest.approx(p.max(-1).mean())
    assert got["margin"] == pytest.approx((1.5 + 0.1) / 2, abs=1e-5)


def test_margin_is_in_the_routers_own_scores():
    logits = torch.tensor([[3.0, -1.0, 1.0]])
    a = 1 / (1 + np.exp(-logits[0].numpy()))
    assert sure(logits, "sigmoid_topk", top_k=1)["margin"] == pytest.approx(a[0] - (a[1] + 0.5), abs=1e-5)


def test_margin_is_undefined_where_all_are_chosen_and_where_groups_forbid_some():
    assert math.isnan(sure(torch.randn(5, 3), top_k=3)["margin"])
    engine = Engine("topk", ["topk.groups=2"], experts=4, top_k=2)
    layer = engine.moe(6, 4)
    x = torch.randn(40, 6)
    assert math.isnan(Confidence().moe_metrics(layer.route(layer.tokens(x)), layer)["margin"])
    two = Engine("hierarchical", experts=4, top_k=2).moe(6, 4)
    assert math.isnan(Confidence().moe_metrics(two.route(two.tokens(x)), two)["margin"])
    assert Confidence().moe_metrics(None, two) == {}


# -- how alike experts are -------------------------------------------------------------------------------


def weights_alike(layer):
    return {name: float(value) for name, value in WeightSimilarity().moe_metrics(layer).items()}


def test_weight_similarity_is_the_mean_cosine_of_all_weights():
    layer = Engine("topk", experts=3, bias=True).moe(4, 5)
    weights = [p.detach().numpy() for p in layer.experts.parameters()]
    flat = np.stack([np.concatenate([w[expert].ravel() for w in weights]) for expert in range(3)])
    norm = np.linalg.norm(flat, axis=1)
    cosine = (flat @ flat.T / norm[:, None] / norm)[np.triu_indices(3, 1)]
    assert weights_alike(layer) == {"weight_similarity": pytest.approx(cosine.mean(), rel=1e-5)}


def test_weight_similarity_of_clones_is_one_and_of_unrelated_ones_near_zero():
    layer = Engine("topk", experts=4).moe(32, 64)
    assert abs(weights_alike(layer)["weight_similarity"]) < 0.02
    with torch.no_grad():
        for p in layer.experts.parameters():
            p[:] = p[0]
    assert weights_alike(layer)["weight_similarity"] == pytest.approx(1)
    assert math.isnan(weights_alike(Engine("topk", experts=1, top_k=1).moe(4, 4))["weight_similarity"])
    bank = Engine("topk").moe(4, modules=[torch.nn.Linear(4, 4) for _ in range(3)])
    assert isinstance(bank.experts, ModuleBank)
    assert weights_alike(bank) == {}


def test_weights_are_found_along_any_axis_and_states_are_none():
    part = Part()
    part.expert_param("wide", (3, 2), fresh=uniform(2), role="in", axis=1)
    part.expert_buffer("state", torch.zeros(2))
    (rows_EW,) = expert_weights(part)
    torch.testing.assert_close(rows_EW, part.wide.detach().T)


def hsic(K, L):
    """The unbiased estimate as Song et al. (2012) write it, eq. 5."""
    n = len(K)
    K, L, one = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), np.ones(n)
    whole = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + whole - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))


def test_cka_is_the_unbiased_estimate():
    y = torch.randn(3, 9, 5, dtype=torch.float64)
    grams = [one @ one.T for one in y.numpy()]
    expected = [[hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L)) for L in grams] for K in grams]
    assert linear_cka(y).tolist() == [pytest.approx(row) for row in expected]


def test_cka_of_turned_scaled_and_moved_clones_is_one_and_of_unrelated_few_tokens_near_zero():
    y = torch.randn(16, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert float(linear_cka(torch.stack([y, 3 * y @ turn + 7]))[0, 1]) == pytest.approx(1)
    unrelated = torch.stack([linear_cka(torch.randn(2, 16, 8, dtype=torch.float64))[0, 1] for _ in range(200)])
    assert float(unrelated.mean()) == pytest.approx(0, abs=0.05)  # the plain estimate has 0.36


def test_output_similarity_cka_is_of_the_probe_and_null_for_what_does_not_vary():
    engine = Engine("topk", experts=3)
    layer = engine.moe(6, 8)
    with torch.no_grad():
        layer.experts.w_in[1], layer.experts.w_out[1] = layer.experts.w_in[0], 2 * layer.experts.w_out[0]
        layer.experts.w_out[2] = 0
    probe = layer.route(layer.tokens(torch.randn(20, 6), torch.arange(20) < 12))
    got = OutputSimilarityCKA().moe_metrics(probe, layer)
    matrix = got["output_similarity_cka_matrix"]
    torch.testing.assert_close(matrix[:2, :2], torch.ones(2, 2, dtype=torch.float64))
    assert matrix[2].isnan().all()
    assert float(got["output_similarity_cka"]) == pytest.approx(1)  # of the one pair that is defined
    few = layer.route(layer.tokens(torch.randn(3, 6)))
    assert OutputSimilarityCKA().moe_metrics(few, layer) == OutputSimilarityCKA().moe_metrics(None, layer) == {}
    assert layer.experts.training


def test_cka_of_answers_that_are_all_the_same_is_undefined():
    y = torch.stack([torch.randn(9, 4), torch.full((9, 4), 0.3)]).double()
    assert linear_cka(y).isnan().tolist() == [[False, True], [True, True]]


# -- co_activation ---------------------------------------------------------------------------------------


def together(*experts, of=4):
    engine, layer = chooser(of, len(experts[0]))
    layer(wish(experts, of))
    return engine.metrics("eval")["moe0"]


def test_co_activation_is_the_share_of_one_experts_tokens_that_the_other_got_too():
    got = together((0, 1), (0, 1), (0, 2))
    expected = [[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [math.nan] * 4]
    assert got["co_activation"].tolist() == [pytest.approx(row, nan_ok=True) for row in expected]
    assert float(got["co_activation_max"]) == 1


def test_co_activation_of_independent_choices_is_chance():
    """(K - 1) / (E - 1) = 3 / 7, all pairs counted; neighbours in order alone would give less."""
    got = together(*[tuple(torch.randperm(8)[:4].tolist()) for _ in range(4000)], of=8)
    off = got["co_activation"][~torch.eye(8).bool()]
    assert float(off.mean()) == pytest.approx(3 / 7, abs=1e-6)  # rows sum to K - 1 exactly
    assert float((off - 3 / 7).abs().max()) < 0.05


def test_co_activation_needs_pairs():
    with pytest.raises(UsageError, match="^co_activation .*top_k=1"):
        Engine("co_activation", experts=4, top_k=1).moe(4, 4)


# -- through the engine ----------------------------------------------------------------------------------

NEW = "churn,router_saturation,confidence,weight_similarity,output_similarity_cka,co_activation"


def test_new_metrics_answer_together_and_leave_the_layer_as_it_was():
    engine = Engine(f"topk,saturation,{NEW}", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(30, 6)

    def probe():
        layer.eval()
        loss = layer(x).square().mean()
        layer.train()
        return loss

    for moved in (0.0, 9.0):
        (layer(x).sum() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
        layer.biases[0]["saturation"].s.copy_(torch.tensor([1.0, 1.0 + moved, 1.0, 1.0]))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        got = engine.metrics("train", probe)["moe0"]
        torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
        assert layer.training
    names = ("churn", "router_saturation", "confidence", "margin", "weight_similarity", "output_similarity_cka")
    assert all(math.isfinite(float(got[name])) for name in (*names, "co_activation_max"))
    assert float(got["router_saturation"]) == pytest.approx(1 - float(got["churn"]))
    assert got["churn"] > 0


def test_a_counting_metric_is_refused_by_a_router_that_makes_no_choices(install):
    from moe_engine import LevelSpec, Router, Slots, hookimpl

    class Mixer(Router):
        """One slot an expert, the mean of all tokens."""

        def __init__(self, spec):
            super().__init__()
            self.expert_param("phi", (spec.experts, spec.dim), fresh=uniform(spec.dim), role="state")

        @property
        def levels(self):
            return (LevelSpec("slot", self.phi.shape[0], 0),)

        def score(self, tokens):
            return (tokens.x @ self.phi.T,)

        def select(self, tokens, levels):
            combine_TE = levels[0].biased.softmax(-1)
            mix_TE = levels[0].biased.softmax(0)
            return combine_TE, Slots(mix_TE[None, ..., None], combine_TE[None, ..., None])

    @attrs.define(eq=False)
    class Plugin:
        traits = Traits(provides=("probs",))

        @hookimpl
        def moe_router(self, spec):
            return Mixer(spec)

    install("router", "mixer", Plugin)
    for name in ("churn", "router_saturation", "co_activation", "output_similarity"):
        with pytest.raises(UsageError, match=f"'{name}' needs experts that each token chose.*router 'mixer'"):
            Engine(f"mixer,{name}", experts=4).moe(6, 8)
    engine = Engine("mixer,confidence", experts=4)
    layer = engine.moe(6, 8).eval()
    x = torch.randn(5, 6)
    layer(x)
    got = engine.metrics("eval", lambda: layer(x).square().mean())["moe0"]
    mass = layer.route(layer.tokens(x)).probs.mean(0)
    torch.testing.assert_close(got["mass"].float(), mass.detach())
    assert not {"load", "cv", "churn"} & got.keys()
    assert got["confidence"] > 0.25
    assert math.isnan(got["margin"])


def test_memories_survive_a_checkpoint_and_begin_anew_with_a_growth():
    from moe_engine import Growth

    engine = Engine("topk,churn,router_saturation,clone", experts=4)
    layer = engine.moe(6, 8, name="moe").eval()
    x = torch.randn(30, 6)

    def measured(one, own):
        own(x)
        return one.metrics("eval", lambda: own(x).square().mean())["moe"]

    assert math.isnan(measured(engine, layer)["churn"])
    twin = Engine("topk,churn,router_saturation,clone", experts=4)
    copy = twin.moe(6, 8, name="moe").eval()
    copy.load_state_dict(layer.state_dict())
    twin.load_state_dict(engine.state_dict())
    assert measured(twin, copy)["churn"] == 0
    assert len(measured(twin, copy)["router_saturation_curve"]) == 2
    twin.grow(Growth("moe", parents=(0,)))
    assert math.isnan(measured(twin, copy)["churn"])
    assert len(measured(twin, copy)["router_saturation_curve"]) == 1


def test_where_every_token_goes_to_every_expert_nothing_is_routed():
    """Which K = E does not mean: a router may choose fewer."""
    every, fewer = (Health().judge(torch.full((4,), load), 4, 100) for load in (100.0, 60.0))
    assert (every.name, fewer.name) == ("healthy", "healthy")
    assert "all 4 experts, so nothing is routed" in every.why and "nothing is routed" not in fewer.why
