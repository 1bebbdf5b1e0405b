"""Losses at balance, at collapse, and by their gradients."""

import math

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_engine import Engine, Finding, LinearRouter, Spec, Traits, UsageError, assign, hookimpl
from moe_engine.contract.setup import Setup
from support import on_ranks

E = 4


def built(name, top_k=1, settings=(), experts=E, **spec):
    """A layer whose raw logits are its input."""
    engine = Engine(f"topk,{name}", settings, experts=experts, top_k=top_k, **spec)
    layer = engine.moe(experts, 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(experts)
    return engine, layer


def term(name, logits, top_k=1, mask=None, settings=(), **spec):
    """A loss of given raw logits [..., E], and the gradient at them."""
    _, layer = built(name, top_k, settings, logits.shape[-1], **spec)
    logits = logits.clone().requires_grad_()
    (value,) = layer.aux_terms(layer.route(layer.tokens(logits, mask))).values()
    value.backward()
    return value.detach(), logits.grad


BALANCED = torch.eye(E).repeat(3, 1) * 3
COLLAPSED = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
RANDOM = torch.randn(12, E, generator=torch.Generator().manual_seed(0))


def test_switch_aux_is_one_at_balance_for_any_probabilities():
    value, grad = term("switch_aux", BALANCED)
    torch.testing.assert_close(value, torch.tensor(1.0))
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-7, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_switch_aux_is_e_over_k_at_collapse(top_k):
    logits = torch.tensor([[60.0, 60.0, 0.0, 0.0] if top_k == 2 else [60.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    torch.testing.assert_close(term("switch_aux", logits, top_k)[0], torch.tensor(E / top_k))


def test_switch_aux_gradient_is_the_papers():
    """d/ds_tj = (E / T) p_tj (f_j - sum_i f_i p_ti)."""
    _, grad = term("switch_aux", RANDOM)
    p = RANDOM.softmax(-1)
    f = torch.bincount(RANDOM.argmax(-1), minlength=E) / 12
    torch.testing.assert_close(grad, E / 12 * p * (f - (p @ f)[:, None]))


def test_z_loss_is_log_e_squared_for_zero_logits_and_leaves_padding_out():
    zero = torch.tensor(math.log(E) ** 2)
    torch.testing.assert_close(term("z_loss", torch.zeros(5, E))[0], zero)
    mask = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(term("z_loss", torch.zeros(5, E), mask=mask)[0], zero)
    shifted = RANDOM - torch.logsumexp(RANDOM, -1, keepdim=True)
    torch.testing.assert_close(term("z_loss", shifted)[0], torch.tensor(0.0), atol=1e-10, rtol=0)


def test_z_loss_gradient():
    """d/ds = 2 logsumexp p / T."""
    _, grad = term("z_loss", RANDOM)
    torch.testing.assert_close(grad, 2 * torch.logsumexp(RANDOM, -1, keepdim=True) * RANDOM.softmax(-1) / 12)


def test_z_loss_sees_raw_logits_and_every_level():
    engine = Engine("hierarchical,absolute_saturation,z_loss", experts=E, top_k=1)
    layer = engine.moe(3, 4)
    terms = layer.aux_terms(layer.route(layer.tokens(torch.zeros(5, 3))))
    assert list(terms) == ["z_loss.group", "z_loss.expert"]
    torch.testing.assert_close(terms["z_loss.expert"], torch.tensor(math.log(E) ** 2))


def test_gate_variance_is_zero_at_balance_and_e_at_collapse():
    torch.testing.assert_close(term("gate_variance", BALANCED)[0], torch.tensor(0.0))
    torch.testing.assert_close(term("gate_variance", COLLAPSED)[0], torch.tensor(float(E)))


def test_gate_variance_is_the_unbiased_variance_of_the_scaled_mean():
    mean = RANDOM.softmax(-1).mean(0)
    torch.testing.assert_close(term("gate_variance", RANDOM)[0], (E * mean).var())


def test_a_loss_on_two_collapsed_layers_is_not_pooled():
    """Two layers collapsed on different experts: each says E, the mean says E; pooled, they would look balanced."""
    engine = Engine("topk,switch_aux", ["switch_aux.weight=1"], experts=E, top_k=1)
    layers = [engine.moe(E, 4) for _ in range(2)]
    for index, layer in enumerate(layers):
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[index] = 60.0
        layer(torch.ones(8, E))
    torch.testing.assert_close(engine.aux_loss(), torch.tensor(float(E)))


def test_a_layer_may_have_a_weight_of_its_own():
    engine = Engine("topk,switch_aux", experts=E, top_k=1)
    usual = engine.moe(6, 4)
    usual(torch.randn(5, 6))
    assert usual.sums.aux_value > 0
    silent = engine.moe(6, 4, settings=["switch_aux.weight=0"])
    silent(torch.randn(5, 6))
    assert silent.sums.aux_value == 0


def softmax(logits):
    """numpy's own, in float64."""
    exps = np.exp(logits.double().numpy())
    return exps / exps.sum(-1, keepdims=True)


def remark(plugins, settings=(), **spec):
    """What the first plugin typed says of the mix."""
    engine = Engine(plugins, settings, **spec)
    first = plugins.split(",")[0]
    setup = Setup(engine.plugins.active, Spec(**{"dim": 0, "hidden": 0, **spec}))
    return engine.plugins.active[first].moe_check(setup)


# -- gshard ------------------------------------------------------------------------------------------


def test_gshard_is_one_at_balance_and_e_where_all_put_one_expert_first():
    torch.testing.assert_close(term("gshard", BALANCED, 2)[0], torch.tensor(1.0))
    torch.testing.assert_close(term("gshard", COLLAPSED, 2)[0], torch.tensor(float(E)))
    torch.testing.assert_close(term("gshard", torch.zeros(8, E), 2)[0], torch.tensor(1.0))


def test_gshard_is_the_papers_formula_times_e_squared():
    p, T = softmax(RANDOM), len(RANDOM)
    c = np.bincount(p.argmax(-1), minlength=E) / T
    assert float(term("gshard", RANDOM, 2)[0]) == pytest.approx(E**2 * np.mean(c * p.mean(0)))


def test_gshard_gradient_is_that_of_first_choices():
    _, grad = term("gshard", RANDOM, 2)
    p = RANDOM.softmax(-1)
    c = torch.bincount(RANDOM.argmax(-1), minlength=E) / 12
    torch.testing.assert_close(grad, E / 12 * p * (c - (p @ c)[:, None]))


def test_gshard_looks_at_first_choices_alone():
    """First choices even, all second ones on expert 3: balanced to gshard, not to switch_aux."""
    logits = 9 * torch.eye(3, E).repeat(4, 1) + torch.tensor([0, 0, 0, 8.0])
    p = softmax(logits)
    assert float(term("gshard", logits, 2)[0]) == pytest.approx(E / 3 * p[:, :3].mean(0).sum())
    assert float(term("switch_aux", logits, 2)[0]) > float(term("gshard", logits, 2)[0])
    assert float(term("gshard", logits)[0]) == pytest.approx(float(term("switch_aux", logits)[0]))


def test_gshard_leaves_padding_out():
    mask = torch.arange(12) < 7
    torch.testing.assert_close(term("gshard", RANDOM, 2, mask)[0], term("gshard", RANDOM[:7], 2)[0])


# -- importance_cv2 and load_cv2 -----------------------------------------------------------------------


def test_importance_is_the_sum_of_renormalised_gates():
    p = softmax(RANDOM)
    p[p < np.sort(p, -1)[:, [-2]]] = 0
    v = (p / p.sum(-1, keepdims=True)).sum(0)
    assert float(term("importance_cv2", RANDOM, 2)[0]) == pytest.approx(np.var(v) / np.mean(v) ** 2)


@pytest.mark.parametrize("of", ["gates", "probs"])
@pytest.mark.parametrize("used", [1, 2])
def test_importance_is_zero_at_balance_and_e_over_k_less_one_at_collapse(of, used):
    settings = [f"importance_cv2.of={of}"]
    balanced, _ = term("importance_cv2", BALANCED, settings=settings)
    torch.testing.assert_close(balanced, torch.tensor(0.0), atol=1e-6, rtol=0)
    logits = torch.where(torch.arange(E) < used, 60.0, 0.0).expand(8, E)
    torch.testing.assert_close(term("importance_cv2", logits, used, settings=settings)[0], torch.tensor(E / used - 1))


def test_importance_of_all_probabilities_is_gate_variance_but_for_a_factor():
    value, _ = term("importance_cv2", RANDOM, settings=["importance_cv2.of=probs"])
    torch.testing.assert_close(value, term("gate_variance", RANDOM)[0] * (E - 1) / E)
    said = remark("importance_cv2,gate_variance", ["importance_cv2.of=probs"])
    assert isinstance(said, Finding)
    assert "gate_variance" in said.why
    assert remark("importance_cv2,gate_variance") is None


def test_importance_counts_before_capacity():
    value, grad = term("importance_cv2", RANDOM, 2, capacity=0.5)
    torch.testing.assert_close((value, grad), term("importance_cv2", RANDOM, 2))
    assert grad.abs().sum() > 0


def test_importance_of_one_expert_and_of_no_token_is_zero():
    assert float(term("importance_cv2", torch.randn(5, 1))[0]) == 0
    nothing, grad = term("importance_cv2", RANDOM, 2, torch.zeros(12, dtype=torch.bool))
    assert float(nothing) == 0
    assert grad.isfinite().all()


class Chancy(LinearRouter):
    """Top-k whose noise would be a coin: every expert's chance is its probability."""

    def select(self, tokens, levels):
        p = levels[0].biased.softmax(-1)
        expert = levels[0].select_by(p).topk(self.top_k, dim=-1).indices
        return p, assign(p.gather(-1, expert), expert, tokens, lambda: p)


@attrs.define(eq=False)
class ChancyPlugin:
    traits = Traits(provides=("logits", "probs", "load", "top_k", "smooth_load"))

    @hookimpl
    def moe_router(self, spec):
        return Chancy(spec)


def test_load_cv2_is_that_of_the_smooth_load_of_real_tokens(install):
    install("router", "chancy", ChancyPlugin)
    layer = Engine("chancy,load_cv2", experts=E, top_k=1).moe(E, 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(E)
    mask = torch.arange(12) < 9
    value = layer.aux_terms(layer.route(layer.tokens(RANDOM, mask)))["load_cv2"]
    v = softmax(RANDOM[:9]).sum(0)
    assert float(value.detach()) == pytest.approx(np.var(v) / np.mean(v) ** 2)
    value.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_load_cv2_needs_an_estimate_with_a_gradient_and_a_choice(install):
    with pytest.raises(UsageError, match="loss 'load_cv2' needs a differentiable estimate of the load"):
        built("load_cv2")
    install("router", "chancy", ChancyPlugin)
    with pytest.raises(UsageError, match="^load_cv2 .* all 4 experts"):
        Engine("chancy,load_cv2", experts=4, top_k=4).moe(6, 8)


# -- sequence_aux --------------------------------------------------------------------------------------


def test_two_sequences_collapsed_on_different_experts_are_balanced_only_as_a_batch():
    logits = 60 * torch.eye(2).repeat_interleave(5, 0).view(2, 5, 2)
    torch.testing.assert_close(term("sequence_aux", logits)[0], torch.tensor(2.0))
    torch.testing.assert_close(term("switch_aux", logits)[0], torch.tensor(1.0))
    torch.testing.assert_close(term("sequence_aux", logits.view(10, 2))[0], torch.tensor(1.0))  # one sequence


def test_sequence_aux_is_the_mean_over_sequences_of_their_own_switch_aux():
    """Lengths 7, 3 and 0: the third has no token and is no sequence."""
    logits = torch.randn(3, 7, E)
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])
    value, grad = term("sequence_aux", logits, 2, mask)
    expected = []
    for row, length in zip(logits, (7, 3), strict=False):
        p = softmax(row[:length])
        f = np.bincount(np.argsort(-p, -1)[:, :2].ravel(), minlength=E) / (2 * length)
        expected.append(E * (f * p.mean(0)).sum())
    assert float(value) == pytest.approx(np.mean(expected))
    assert grad[~mask].abs().sum() == 0
    assert grad[mask].abs().min() > 0


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_sequence_aux_counts_without_the_selection_bias(router):
    engine = Engine([router, "loss_free", "sequence_aux", "switch_aux"], experts=E, top_k=2)
    layer = engine.moe(6, 4)
    x = torch.randn(20, 6)
    before = layer.aux_terms(layer.route(layer.tokens(x)))
    torch.testing.assert_close(before["sequence_aux"], before["switch_aux"])
    layer.biases[0]["loss_free"].b[:] = torch.tensor([9.0, 0.0, 0.0, -9.0])
    after = layer.aux_terms(layer.route(layer.tokens(x)))
    torch.testing.assert_close(after["sequence_aux"], before["sequence_aux"], rtol=0, atol=0)
    assert after["switch_aux"] != before["switch_aux"]


def test_sequence_aux_is_one_for_equal_scores():
    torch.testing.assert_close(term("sequence_aux", torch.zeros(2, 8, E), 2)[0], torch.tensor(1.0))


# -- global_aux ----------------------------------------------------------------------------------------

LEFT, RIGHT = (60 * torch.eye(2)[[side] * 6] for side in (0, 1))


def test_global_aux_of_one_process_and_one_micro_batch_is_switch_aux():
    torch.testing.assert_close(term("global_aux", RANDOM, 2), term("switch_aux", RANDOM, 2), rtol=0, atol=0)


def one_micro_batch(engine, layer, x):
    """The value of the loss in a forward that its backward follows."""
    y = layer(x)
    value = float(engine.aux_loss().detach())
    (y.sum() + engine.aux_loss()).backward()
    engine.after_backward()
    return value


def test_global_aux_sees_the_micro_batches_before_and_begins_anew_with_each_step():
    """Collapsed on the one side, then on the other: 2 by itself, 1 together; a skipped step is forgotten too."""
    engine, layer = built("global_aux", experts=2, settings=["global_aux.weight=1"])
    for skipped in (False, True, False):
        values = [one_micro_batch(engine, layer, x) for x in (LEFT, RIGHT, RIGHT)]
        assert values == pytest.approx([2, 1, 2 * 2 / 3])  # f_RIGHT = 12 / 18
        engine.after_step(skipped=skipped)


def gradients(wrap, **spec):
    """A step of three micro-batches: what it leaves at the router."""
    torch.manual_seed(0)
    engine = Engine("topk,global_aux", ["global_aux.weight=1"], experts=4, top_k=2, **spec)
    layer = engine.moe(6, 8)
    run = wrap(layer)
    for seed in range(3):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        (run(x).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
    return layer.router.weight.grad, layer.sums.step.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_global_aux_of_a_recomputed_forward_is_the_same(reentrant):
    recomputed = gradients(lambda layer: lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close(recomputed, gradients(lambda layer: layer))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_global_aux_of_a_compiled_layer_is_the_same(backend):
    torch._dynamo.reset()
    compiled = gradients(lambda layer: torch.compile(layer, fullgraph=True, backend=backend))
    torch.testing.assert_close(compiled, gradients(lambda layer: layer))


def _sides(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine, layer = built("global_aux", experts=2, settings=["global_aux.weight=1"])
    value = one_micro_batch(engine, layer, (LEFT, RIGHT)[rank])
    torch.manual_seed(0)
    engine = Engine(SHARED, SHARED_SETTINGS, experts=4, top_k=2)
    layer = engine.moe(6, 8)
    parallel = nn.parallel.DistributedDataParallel(layer)
    (0 * parallel(SHARED_INPUT.chunk(2)[rank]).sum() + engine.aux_loss()).backward()
    torch.save([torch.tensor(value), layer.router.weight.grad], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


SHARED = "topk,importance_cv2,gate_variance,mutual_information"
SHARED_SETTINGS = ["mutual_information.weight=1"]
SHARED_INPUT = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))


def test_two_processes_balance_together(tmp_path):
    """global_aux of processes collapsed on different experts is 1; other losses' gradients are those of one process."""
    on_ranks(_sides, str(tmp_path))
    (one, grad), (two, twin) = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert [float(one), float(two)] == pytest.approx([1, 1])
    torch.manual_seed(0)
    engine = Engine(SHARED, SHARED_SETTINGS, experts=4, top_k=2)
    layer = engine.moe(6, 8)
    (0 * layer(SHARED_INPUT).sum() + engine.aux_loss()).backward()
    torch.testing.assert_close(grad, layer.router.weight.grad)
    torch.testing.assert_close(grad, twin, rtol=0, atol=0)


# -- mutual_information and entropy ----------------------------------------------------------------------


def test_mutual_information_is_minus_log_e_for_sure_and_even_tokens_and_zero_for_equal_ones():
    sure, grad = term("mutual_information", 200 * torch.eye(E).repeat(3, 1))
    torch.testing.assert_close(sure, torch.tensor(-math.log(E)))
    assert grad.isfinite().all()
    torch.testing.assert_close(term("mutual_information", RANDOM[:1].repeat(9, 1))[0], torch.tensor(0.0))


def test_mutual_information_is_the_mean_divergence_from_the_mean():
    p = softmax(RANDOM)
    divergence = (p * np.log(p / p.mean(0))).sum(-1).mean()
    assert float(term("mutual_information", RANDOM)[0]) == pytest.approx(-divergence)


def test_entropy_of_even_and_of_sure_tokens():
    tokens, batch = ([f"entropy.form={form}"] for form in ("token_min", "batch_max"))
    log_e = torch.tensor(math.log(E))
    torch.testing.assert_close(term("entropy", torch.zeros(5, E), settings=tokens)[0], log_e)
    torch.testing.assert_close(term("entropy", torch.zeros(5, E), settings=batch)[0], -log_e)
    sure, grad = term("entropy", COLLAPSED * 4, settings=tokens)
    torch.testing.assert_close(sure, torch.tensor(0.0))
    assert grad.isfinite().all()
    torch.testing.assert_close(term("entropy", COLLAPSED * 4, settings=batch)[0], torch.tensor(0.0))


def test_entropys_gradient_is_the_formulas():
    """d/ds of the mean of H is -p (ln p + H) / T."""
    _, grad = term("entropy", RANDOM)
    p = RANDOM.softmax(-1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(grad, -p * (p.log() + H) / 12)


def test_both_entropies_together_are_mutual_information_and_that_is_said():
    both = [term("entropy", RANDOM, settings=[f"entropy.form={form}"])[0] for form in ("token_min", "batch_max")]
    torch.testing.assert_close(sum(both), term("mutual_information", RANDOM)[0])
    said = remark("mutual_information,entropy")
    assert isinstance(said, Finding)
    assert "counts twice" in said.why
    assert remark("mutual_information") is None


# -- router_diversity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "of_two"), [("l1", 3 * E), ("frobenius", 3 * E**0.5)])
def test_router_diversity_is_zero_for_orthonormal_rows(norm, of_two):
    """Rows of length 2: E entries of 4 - 1."""
    settings = [f"router_diversity.norm={norm}"]
    _, layer = built("router_diversity", settings=settings)
    routing = layer.route(layer.tokens(RANDOM))
    with torch.no_grad():
        layer.router.weight[:] = torch.linalg.qr(torch.randn(E, E)).Q
    value = layer.aux_terms(routing)["router_diversity.weight"]
    torch.testing.assert_close(value, torch.tensor(0.0), atol=1e-5, rtol=0)
    with torch.no_grad():
        layer.router.weight[:] = 2 * torch.eye(E)
    value = layer.aux_terms(routing)["router_diversity.weight"]
    torch.testing.assert_close(value, torch.tensor(float(of_two)))
    value.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_router_diversity_of_equal_rows():
    """Rows e and e: the Gram matrix is all ones, E (E - 1) of them off the diagonal."""
    _, layer = built("router_diversity")
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(E)[0]
    value = layer.aux_terms(layer.route(layer.tokens(RANDOM)))["router_diversity.weight"]
    torch.testing.assert_close(value, torch.tensor(float(E * (E - 1))))


def test_router_diversity_has_a_term_for_each_level():
    layer = Engine("hierarchical,router_diversity", experts=E, top_k=1).moe(6, 4)
    terms = layer.aux_terms(layer.route(layer.tokens(torch.randn(5, 6))))
    assert set(terms) == {"router_diversity.group_weight", "router_diversity.weight"}


def test_router_diversity_says_what_it_cannot_reach_and_what_undoes_it():
    assert "8 rows of 4" in remark("router_diversity", experts=8, dim=4).why
    assert remark("router_diversity", experts=4, dim=4) is None
    assert "clone" in remark("router_diversity,clone,schedule", experts=4, dim=4).why


# -- output_similarity -----------------------------------------------------------------------------------


def similar(experts=3, settings=(), top_k=2, **spec):
    """(engine, a layer of one-layer experts F_i(x) = max(x, 0) W_i, its experts' W [E, D, D])."""
    engine = Engine("topk,output_similarity", settings, experts=experts, top_k=top_k, **spec)
    layer = engine.moe(4, 4)
    with torch.no_grad():
        layer.experts.w_in[:] = torch.eye(4)
    return engine, layer, layer.experts.w_out


def similarity(layer, x, mask=None):
    layer.zero_grad()
    value = layer.aux_terms(layer.route(layer.tokens(x, mask)))["output_similarity"]
    value.backward()
    return float(value.detach())


def test_output_similarity_is_the_mean_over_tokens_and_pairs():
    _, layer, w_out = similar(experts=5, top_k=3)
    x = torch.rand(11, 4)
    expected = []
    for token, chosen in zip(x, layer.route(layer.tokens(x)).plan.expert.view(11, 3), strict=True):
        y = [(token.relu() @ w_out[i]).detach().double().numpy() for i in chosen]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            expected.append((y[i] @ y[j]) ** 2 / (y[i] @ y[i]) / (y[j] @ y[j]))
    assert similarity(layer, x) == pytest.approx(np.mean(expected), rel=1e-5)
    chosen = layer.route(layer.tokens(x)).load > 0
    assert (w_out.grad.abs().amax((1, 2)) > 0).tolist() == chosen.tolist()


def test_output_similarity_of_orthogonal_experts_is_zero_and_of_clones_one():
    _, layer, w_out = similar()
    x = torch.rand(6, 4)
    with torch.no_grad():
        w_out.zero_()
        for expert in range(3):
            w_out[expert, :, expert] = 1.0 + expert  # each answers along an axis of its own
    assert similarity(layer, x) == pytest.approx(0)
    with torch.no_grad():
        w_out[:] = torch.randn(4, 4) * torch.tensor([1.0, 5.0, 0.01])[:, None, None]  # scaled clones
    assert similarity(layer, x) == pytest.approx(1, rel=1e-5)
    assert w_out.grad.isfinite().all()
    assert w_out.grad.abs().max() < 1e-2


def test_output_similarity_of_an_output_of_zero_is_zero_and_finite():
    _, layer, w_out = similar(experts=2)
    with torch.no_grad():
        w_out[0] = 0
    assert similarity(layer, torch.rand(6, 4)) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_output_similarity_takes_evenly_spaced_real_tokens():
    from moe_engine.plugins.losses.output_similarity import spread

    _, layer, _ = similar()
    assert spread(layer.tokens(torch.randn(10, 4)), 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(layer.tokens(torch.randn(3, 4)), 5).tolist() == [0, 1, 2]
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    assert spread(layer.tokens(torch.randn(8, 4), mask), 2).tolist() == [1, 4]
    x = torch.randn(8, 4)
    assert similarity(layer, x, mask) == pytest.approx(similarity(layer, x[mask]))
    mask[0] = True  # five of eight: none may count twice
    assert similarity(layer, x, mask) == pytest.approx(similarity(layer, x[mask]))
    assert similarity(layer, x, torch.zeros(8, dtype=torch.bool)) == 0


def test_output_similarity_needs_two_choices_and_runs_under_autocast():
    with pytest.raises(UsageError, match="^output_similarity .*top_k=1"):
        similar(top_k=1)
    _, layer, _ = similar()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(6, 4, dtype=torch.bfloat16))
    assert 0 < float(layer.sums.aux_value) < 1


def test_a_loss_on_weights_alone_is_not_called_without_effect():
    """They have no gradient at the logits, which says nothing of them."""
    engine = Engine("topk,output_similarity,router_diversity,switch_aux", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(20, 6)
    layer.eval()(x)
    metrics = engine.metrics("eval", lambda: layer(x).square().mean())["moe0"]
    assert [name for name in metrics if name.startswith(("effect.", "inert."))] == ["effect.switch_aux"]


# -- all of them -----------------------------------------------------------------------------------------

ALL = [
    *("switch_aux", "z_loss", "gate_variance", "gshard", "importance_cv2", "sequence_aux", "global_aux"),
    *("mutual_information", "entropy", "router_diversity", "output_similarity"),
]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "router", ["topk", *(pytest.param(name, marks=pytest.mark.long) for name in ("sigmoid_topk", "hierarchical"))]
)
def test_every_loss_compiles_and_leaves_padding_out(router, backend):
    """One graph, the same gradients; what stands at padding changes nothing."""
    x, mask = torch.randn(2, 7, 6), torch.arange(7) < torch.tensor([[7], [4]])
    noise = torch.where(mask[..., None], 0.0, 100.0)

    def trial(compiled, x):
        torch.manual_seed(0)
        engine = Engine([router, *ALL], experts=4, top_k=2)
        layer = engine.moe(6, 8)
        if compiled:
            torch._dynamo.reset()
            layer.compile(fullgraph=True, backend=backend)
        (layer(x, mask).square().mean() + engine.aux_loss()).backward()
        return [p.grad for p in layer.parameters()], layer.sums.step.grad

    expected = trial(False, x)
    torch.testing.assert_close(trial(True, x), expected)
    torch.testing.assert_close(trial(False, x + noise), expected)
