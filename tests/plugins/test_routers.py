"""Routers on numbers small enough to check on paper."""

import pytest
import torch

from moe_engine import Engine, Growth, UsageError
from support import refused

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def route(plugins, logits, settings=(), bias=None, **spec):
    """The routing of given raw logits: rows are the identity, so that x is the logits."""
    engine = Engine(plugins, settings, experts=logits.shape[-1], **spec)
    layer = engine.moe(logits.shape[-1], 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(logits.shape[-1])
        if bias is not None:
            layer.biases[0]["loss_free"].b[:] = torch.tensor(bias)
    return layer.route(layer.tokens(logits))


def gates(*args, **more):
    return route(*args, **more).gates()[0]


def test_topk_renormalises_for_two_and_keeps_the_raw_probability_for_one():
    p = LOGITS[0].softmax(-1)
    torch.testing.assert_close(
        gates("topk", LOGITS, top_k=2), torch.stack([p[0], p[1], 0 * p[0], 0 * p[0]]) / (p[0] + p[1])
    )
    torch.testing.assert_close(gates("topk", LOGITS, top_k=1), torch.stack([p[0], 0 * p[0], 0 * p[0], 0 * p[0]]))
    torch.testing.assert_close(gates("topk", LOGITS, ["topk.renorm=false"], top_k=2)[:2], p[:2])
    torch.testing.assert_close(gates("topk", LOGITS, top_k=4), p)


def test_sigmoid_topk_gates_sum_to_the_scale():
    a = LOGITS[0].sigmoid()
    got = gates("sigmoid_topk", LOGITS, ["sigmoid_topk.scale=2.5"], top_k=2)
    torch.testing.assert_close(got[:2], 2.5 * a[:2] / a[:2].sum())
    torch.testing.assert_close(gates("sigmoid_topk", LOGITS, top_k=1)[:1], a[:1])
    torch.testing.assert_close(route("sigmoid_topk", LOGITS, top_k=2).probs[0], a / a.sum())


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_a_selection_bias_moves_the_choice_and_not_the_gate(router):
    free = route(f"{router},loss_free", LOGITS, top_k=4)
    moved = route(f"{router},loss_free", LOGITS, top_k=1, bias=[-9.0, 0.0, 0.0, 5.0])
    assert moved.plan.expert.tolist() == [3]
    raw = LOGITS.softmax(-1) if router == "topk" else LOGITS.sigmoid()
    torch.testing.assert_close(moved.plan.weight, raw[0, 3:])
    torch.testing.assert_close(moved.probs, free.probs)


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_groups_limit_the_choice_also_among_negative_scores(router):
    """Four groups of two, two kept: expert 7 has the third best score, but its group is closed."""
    logits = torch.tensor([[-1.0, -1.1, -1.2, -1.3, -8.0, -8.1, -9.0, -1.25]])
    settings = [f"{router}.groups=4", f"{router}.groups_kept=2"]
    chosen = route(router, logits, settings, top_k=4).chosen()[0]
    assert chosen.nonzero().flatten().tolist() == [0, 1, 2, 3]
    everything = route(router, logits, [f"{router}.groups=4", f"{router}.groups_kept=4"], top_k=4).chosen()
    torch.testing.assert_close(everything, route(router, logits, top_k=4).chosen())


@pytest.mark.parametrize(
    ("groups", "kept", "sentence"),
    [(3, 1, "does not divide"), (2, 3, "more than groups"), (4, 3, "not a multiple"), (8, 1, "hold fewer")],
)
@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_groups_that_do_not_fit_are_refused(router, groups, kept, sentence):
    with pytest.raises(UsageError, match=sentence):
        Engine(router, [f"{router}.groups={groups}", f"{router}.groups_kept={kept}"], experts=8, top_k=2).moe(6, 4)


def hierarchical(logits_group, logits_leaf, settings, **spec):
    engine = Engine("hierarchical", settings, experts=len(logits_leaf), **spec)
    layer = engine.moe(1, 4)
    with torch.no_grad():
        layer.router.group_weight[:, 0] = torch.tensor(logits_group)
        layer.router.weight[:, 0] = torch.tensor(logits_leaf)
    return layer, layer.route(layer.tokens(torch.ones(1, 1)))


def test_hierarchical_gate_is_the_product_of_both_levels():
    """Groups {0,1} and {2,3}; both kept, one pick in each: outer renormalised over two, inner raw."""
    _, routing = hierarchical([1.0, 0.0], [0.0, 2.0, 3.0, 0.0], ["hierarchical.groups_kept=2"], top_k=2)
    outer = torch.tensor([1.0, 0.0]).softmax(-1)
    inner = torch.tensor([0.0, 2.0]).softmax(-1)[1], torch.tensor([3.0, 0.0]).softmax(-1)[0]
    torch.testing.assert_close(routing.gates()[0, 1:3], torch.stack([outer[0] * inner[0], outer[1] * inner[1]]))
    torch.testing.assert_close(routing.probs.sum(), torch.tensor(1.0))


def test_hierarchical_with_two_picks_on_both_levels_sums_to_one():
    _, routing = hierarchical([1.0, 0.0], [0.0, 2.0, 3.0, 0.0], ["hierarchical.groups_kept=2"], top_k=4)
    torch.testing.assert_close(routing.plan.weight.sum(), torch.tensor(1.0))


def test_hierarchical_with_one_group_each_is_the_flat_primary():
    _, routing = hierarchical([1.0, 0.0, 3.0], [5.0, 2.0, 3.0], ["hierarchical.groups=3"], top_k=1)
    torch.testing.assert_close(routing.gates()[0, 2], torch.tensor([1.0, 0.0, 3.0]).softmax(-1)[2])


def test_hierarchical_groups_may_differ_in_size():
    layer, routing = hierarchical([0.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0], [], top_k=2)
    assert layer.router.group_of.tolist() == [0, 0, 0, 1, 1]
    assert sorted(routing.plan.expert.tolist()) == [3, 4]


def test_hierarchical_biases_act_on_each_level_and_compete_inside_a_group():
    engine = Engine("hierarchical,loss_free", ["loss_free.rate=1"], experts=4, top_k=1)
    layer = engine.moe(1, 4)
    with torch.no_grad():
        layer.router.group_weight[:, 0] = torch.tensor([9.0, 0.0])
        layer.router.weight[:, 0] = torch.tensor([9.0, 0.0, 0.0, 0.0])
    layer(torch.ones(5, 1)).sum().backward()
    engine.after_backward()
    engine.after_step()
    assert layer.biases[0]["loss_free"].b.tolist() == [-1.0, 1.0]
    assert layer.biases[1]["loss_free"].b.tolist() == [
        -1.5,
        0.5,
        0.5,
        0.5,
    ]  # group 2 had no load: up by one, then centred


@pytest.mark.parametrize(
    ("settings", "spec", "sentence"),
    [
        (["hierarchical.groups_kept=3"], {}, "more than groups"),
        (["hierarchical.groups=4", "hierarchical.groups_kept=3"], {"top_k": 4}, "not a multiple"),
        (["hierarchical.groups=8"], {}, "hold fewer than top_k=2"),
    ],
)
def test_hierarchical_shapes_that_do_not_fit_are_refused(settings, spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        Engine("hierarchical", settings, experts=8, **spec).moe(6, 4)


def test_topk_refuses_to_renormalise_a_single_gate():
    with pytest.raises(UsageError, match="topk.renorm at top_k=1"):
        Engine("topk", ["topk.renorm=true"], top_k=1).moe(6, 4)


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk", "hierarchical"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_router_learns_from_the_task_for_every_k(router, top_k):
    engine = Engine(
        router, ["hierarchical.groups=2"] if router == "hierarchical" and top_k < 3 else [], experts=8, top_k=top_k
    )
    layer = engine.moe(6, 8)
    x = torch.randn(32, 6)
    engine.check_learning(lambda: layer.eval()(x).square().mean())
    for name, rows in layer.router.named_parameters():
        layer.zero_grad()
        layer.train()(x).square().mean().backward()
        assert rows.grad.norm() > 1e-6, name


def test_hierarchical_groups_of_one_expert_can_be_learnt():
    """Inside such a group there is nothing to choose, so that no gradient is no fault."""
    engine = Engine("hierarchical", ["hierarchical.groups=4", "hierarchical.groups_kept=2"], experts=4, top_k=2)
    layer = engine.moe(6, 8).eval()
    engine.check_learning(lambda: layer(torch.randn(32, 6)).square().mean())


def test_sigmoid_scores_far_below_zero_still_make_a_distribution():
    """With an epsilon in the quotient a router could make every balance loss 0 by lowering its logits."""
    routing = route("sigmoid_topk,switch_aux", torch.full((5, 4), -110.0), top_k=2)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(5))
    torch.testing.assert_close(routing.gates().sum(-1), torch.ones(5))


# -- noisy_topk ------------------------------------------------------------------------------------


def test_noisy_topk_starts_without_a_preference_and_with_the_deviation_of_softplus_of_zero():
    layer = Engine("noisy_topk", experts=4, top_k=2).moe(6, 4)
    level = layer.route(layer.tokens(torch.randn(5000, 6))).levels[0]
    assert not level.logits.any()
    torch.testing.assert_close(level.scores.std(), torch.tensor(0.6931 + 0.01), atol=0.02, rtol=0)
    assert not layer.eval().route(layer.tokens(torch.randn(5, 6))).levels[0].scores.any()


def test_noisy_topk_gates_are_a_softmax_over_the_chosen_and_at_one_over_all():
    layer = Engine("noisy_topk", experts=4, top_k=2).moe(4, 4).eval()
    layer.router.weight.data[:] = torch.eye(4)
    routing = layer.route(layer.tokens(LOGITS))
    torch.testing.assert_close(routing.gates()[0, :2], LOGITS[0, :2].softmax(-1))
    single = Engine("noisy_topk", experts=4, top_k=1).moe(4, 4).eval()
    single.router.weight.data[:] = torch.eye(4)
    torch.testing.assert_close(single.route(single.tokens(LOGITS)).plan.weight, LOGITS[0].softmax(-1)[:1])


def test_noisy_topk_chances_are_what_drawing_one_experts_noise_anew_gives():
    """Against 20,000 drawings of one expert's noise, the others' held."""
    torch.manual_seed(3)
    clean_TE, noise_TE, deviation = torch.randn(5, 6), torch.randn(5, 6), 0.6931 + 0.01
    layer = Engine("noisy_topk", experts=6, top_k=2).moe(6, 4)
    layer.router.weight.data[:] = torch.eye(6)
    held, torch.randn_like = torch.randn_like, lambda _: noise_TE
    try:
        routing = layer.route(layer.tokens(clean_TE))
    finally:
        torch.randn_like = held
    chances_TE = routing.plan.chances()
    noisy_TE = clean_TE + deviation * noise_TE
    for expert in range(6):
        drawn_MTE = noisy_TE.repeat(20_000, 1, 1)
        drawn_MTE[:, :, expert] = clean_TE[:, expert] + deviation * torch.randn(20_000, 5)
        share_T = (drawn_MTE.topk(2, dim=-1).indices == expert).any(-1).float().mean(0)
        torch.testing.assert_close(chances_TE[:, expert].detach(), share_T, atol=0.015, rtol=0)


def test_noisy_topk_chances_add_up_to_about_the_choices_and_leave_padding_out():
    layer = Engine("noisy_topk", experts=8, top_k=2).moe(6, 4)
    mask = torch.arange(4000) < 3000
    routing = layer.route(layer.tokens(torch.randn(4000, 6), mask))
    assert abs(float(routing.smooth_load.detach().sum()) / 6000 - 1) < 0.02
    routing.smooth_load.square().sum().backward()
    assert layer.router.noise_weight.grad.any() and layer.router.weight.grad.any()


# -- expert_choice ---------------------------------------------------------------------------------


def test_expert_choice_gives_every_expert_its_best_tokens():
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    routing = route("expert_choice", logits, top_k=1)
    p = logits.softmax(-1)
    assert routing.chosen().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    torch.testing.assert_close(routing.gates(), p * routing.chosen())


def test_expert_choice_has_equal_loads_and_never_takes_padding():
    layer = Engine("expert_choice", experts=4, top_k=2).moe(6, 4)
    x, mask = torch.randn(3, 20, 6), torch.arange(20).expand(3, 20) < torch.tensor([[20], [8], [0]])
    routing = layer.route(layer.tokens(x, mask))
    assert routing.load.tolist() == [14.0] * 4  # 28 real tokens * 2 / 4
    assert not routing.chosen()[~mask.flatten()].any()
    own = Engine("expert_choice", ["expert_choice.group=sequence"], experts=4, top_k=2).moe(6, 4)
    per_sequence = own.route(own.tokens(x, mask)).chosen().view(3, 20, 4).sum(1)
    assert per_sequence.tolist() == [[10.0] * 4, [4.0] * 4, [0.0] * 4]


# -- sinkhorn --------------------------------------------------------------------------------------


def test_sinkhorn_gives_every_expert_the_same_mass_also_of_far_apart_columns():
    from moe_engine.plugins.routers.sinkhorn import log_transport

    torch.manual_seed(0)
    layer = Engine("sinkhorn", experts=8, top_k=2).moe(8, 4)
    scores = torch.randn(64, 8) + torch.linspace(0, 26, 8)
    plan = log_transport(scores, layer.tokens(torch.zeros(64, 8)), 8).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 8.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.ones(64))
    torch.testing.assert_close(
        log_transport(scores, layer.tokens(torch.zeros(64, 8)), 60).exp(), plan, atol=1e-3, rtol=0
    )


def test_sinkhorn_chooses_the_same_with_a_constant_on_one_expert_and_gates_by_raw_logits():
    torch.manual_seed(0)
    logits = torch.randn(32, 4)
    before, after = (
        route("sinkhorn", logits, top_k=2),
        route("sinkhorn", logits + torch.tensor([5.0, 0, 0, 0]), top_k=2),
    )
    assert (before.chosen() == after.chosen()).float().mean() > 0.98
    torch.testing.assert_close(before.gates(), logits.softmax(-1) * before.chosen())
    single = route("sinkhorn", logits, top_k=1)
    torch.testing.assert_close(single.gates(), logits.sigmoid() * single.chosen())
    assert single.load.max() <= 11  # near 8 each; top-1 of the raw logits is not
    layer = Engine("sinkhorn", experts=4, top_k=1).moe(4, 4).eval()
    layer.router.weight.data[:] = torch.eye(4)
    assert layer.route(layer.tokens(logits)).plan.expert.tolist() == logits.argmax(-1).tolist()


# -- hash ------------------------------------------------------------------------------------------


def hashed(vocab=60, experts=4, top_k=2, settings=(), plugins="hash"):
    engine = Engine(plugins, settings, experts=experts, top_k=top_k)
    return engine, engine.moe(6, 4, vocab=vocab, name="m")


def test_hash_routes_an_id_always_alike_and_deals_ids_out_evenly():
    _, layer = hashed()
    ids = torch.arange(60)
    first, again = (layer.route(layer.tokens(torch.randn(60, 6), ids=ids)) for _ in range(2))
    assert first.plan.expert.tolist() == again.plan.expert.tolist()
    assert first.load.tolist() == [30.0] * 4
    assert all(len(set(row)) == 2 for row in layer.router.table.tolist())
    assert set(first.plan.weight.tolist()) == {0.5}
    with refused("missing-token-ids", "hash", "ids="):
        layer(torch.randn(3, 6))
    with pytest.raises(UsageError, match="^hash routes by token ids"):
        Engine("hash", experts=4).moe(6, 4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hash_with_exact_copies_keeps_its_function_when_it_grows(top_k):
    """The copy takes over half of its parent's ids; require_exact holds it against a measurement."""
    engine, layer = hashed(top_k=top_k, plugins="hash,clone", settings=["clone.noise=0"])
    x, ids = torch.randn(200, 6), torch.randint(60, (200,))
    before = layer.eval()(x, ids=ids)
    grown = engine.grow(Growth("m", parents=(1, 1), require_exact=True), probe=lambda: layer(x, ids=ids).sum())
    assert grown.change == 0.0
    torch.testing.assert_close(layer(x, ids=ids), before, rtol=0, atol=0)
    # of 15 ids the first new expert gets 7, the second 4 of the 8 left; of 30: 15, and 7 of 15
    shares = {1: [15, 4, 15, 15, 7, 4], 2: [30, 8, 30, 30, 15, 7]}
    assert layer.router.table.flatten().bincount().tolist() == shares[top_k]


def test_hash_deals_out_the_ids_of_a_removed_expert_and_ids_for_one_without_parent():
    engine, layer = hashed()
    engine.grow(Growth("m", drop=(0,)))
    assert set(layer.router.table.flatten().tolist()) == {0, 1, 2}
    assert all(len(set(row)) == 2 for row in layer.router.table.tolist())
    engine.grow(Growth("m", parents=(None,)))
    assert layer.router.table.flatten().bincount()[3] == 30
    assert all(len(set(row)) == 2 for row in layer.router.table.tolist())


# -- relu ------------------------------------------------------------------------------------------


def test_relu_takes_every_expert_with_a_positive_logit():
    torch.testing.assert_close(route("relu", LOGITS, top_k=1).gates()[0], torch.tensor([2.0, 1.0, 0.0, 0.0]))
    layer = Engine("relu", experts=32, top_k=2).moe(16, 4)
    assert 0.4 < float(layer.route(layer.tokens(torch.randn(500, 16))).load.sum()) / (500 * 32) < 0.6


def test_relu_loss_by_hand():
    """E / K sum_i (load_i / T) (mean gate of i): loads 2, 1 of 2 tokens, mean gates 2, 0.5."""
    routing = route("relu", torch.tensor([[1.0, 1.0], [3.0, -1.0]]), top_k=1)
    layer = Engine("relu", experts=2, top_k=1).moe(2, 4)
    (loss,) = [bound({"routing": routing, "layer": layer, "state": layer.states["relu"]}) for bound in layer.losses]
    torch.testing.assert_close(loss, torch.tensor(2.0 * (1.0 * 2.0 + 0.5 * 0.5)))


def test_relu_moves_its_coefficient_towards_the_wanted_number_of_experts():
    """13 steps of 1.2 are a decade; the mean number of experts comes down to K and stays there."""
    torch.manual_seed(0)
    engine = Engine("relu", ["relu.weight=1e-4"], experts=8, top_k=2)
    layer = engine.moe(16, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    x, counts, multipliers = torch.rand(256, 16), [], []
    for _ in range(200):
        optimizer.zero_grad()
        y = layer(x)
        counts.append(float(layer.route(layer.tokens(x)).load.sum()) / 256)
        ((y - x.tanh()).square().mean() + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        multipliers.append(float(layer.states["relu"].m))
    assert counts[0] > 3 and multipliers[12] == pytest.approx(1.2**13)
    assert 10 < multipliers[12] < 12
    assert 1.5 < sum(counts[-50:]) / 50 < 2.5


def test_relu_with_zero_output_keeps_its_function():
    engine = Engine("relu,zero_output", experts=4, top_k=2)
    layer = engine.moe(6, 4, name="m")
    x = torch.randn(50, 6)
    before = layer.eval()(x)
    assert engine.grow(Growth("m", parents=(0,), require_exact=True), probe=lambda: layer(x).sum()).change < 1e-6
    torch.testing.assert_close(layer(x), before)


# -- threshold -------------------------------------------------------------------------------------


def test_threshold_takes_all_experts_on_the_tokens_side_whatever_its_length():
    torch.manual_seed(0)
    layer = Engine("threshold", experts=6, top_k=2).moe(8, 4)
    x = torch.randn(40, 8)
    chosen = layer.route(layer.tokens(x)).chosen()
    assert torch.equal(chosen, (x @ layer.router.weight.t() > 0).float())
    assert torch.equal(layer.route(layer.tokens(100 * x)).chosen(), chosen)
    gates = layer.route(layer.tokens(x)).gates()
    torch.testing.assert_close(gates, chosen / chosen.sum(-1, keepdim=True).clamp(min=1))


def test_threshold_gives_a_token_that_passes_none_its_best_expert_in_evaluation_only():
    layer = Engine("threshold", experts=4, top_k=1).moe(4, 4)
    layer.router.weight.data[:] = torch.eye(4)
    x = torch.tensor([[-1.0, -2.0, -3.0, -0.5]])
    assert not layer.route(layer.tokens(x)).chosen().any()
    assert layer(x).abs().sum() == 0
    assert layer.eval().route(layer.tokens(x)).chosen().tolist() == [[0, 0, 0, 1]]


def test_threshold_learns_scores_and_thresholds_of_active_pairs_only():
    layer = Engine("threshold", experts=4, top_k=1).moe(4, 4)
    layer.router.weight.data[:] = torch.eye(4)
    layer(torch.tensor([[1.0, 2.0, -3.0, -0.5]])).sum().backward()
    assert [bool(row.any()) for row in layer.router.weight.grad] == [True, True, False, False]
    assert (layer.router.G.grad != 0).tolist() == [True, True, False, False]


# -- top_p -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "expected"), [(0.4, 7), (0.0, 1), (1.0, 16)])
def test_top_p_of_equal_probabilities(p, expected):
    """floor(p E) + 1, and never more than E."""
    assert route("top_p", torch.zeros(3, 16), [f"top_p.p={p}"], top_k=2).load.sum() == 3 * expected


def test_top_p_takes_the_one_that_crosses_and_keeps_raw_gates():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for share, expected in ((0.4, 1), (0.5, 2), (0.79, 2), (0.81, 3)):
        routing = route("top_p", p.log(), [f"top_p.p={share}"], top_k=2)
        torch.testing.assert_close(routing.gates()[0], p[0] * (torch.arange(4) < expected))
    assert route("top_p", torch.tensor([[60.0, 0.0, 0.0]]), top_k=2).load.tolist() == [1, 0, 0]


# -- soft ------------------------------------------------------------------------------------------


def test_soft_weights_add_up_and_zero_phi_mixes_evenly():
    layer = Engine("soft", ["soft.slots=3"], experts=2, top_k=1).moe(4, 4)
    x = torch.randn(2, 5, 4)
    slots = layer.route(layer.tokens(x)).slots
    torch.testing.assert_close(slots.dispatch.sum(1), torch.ones(2, 2, 3))
    torch.testing.assert_close(slots.combine.sum((2, 3)), torch.ones(2, 5))
    layer.router.phi.data.zero_()
    mean = x.mean(1, keepdim=True)
    expected = torch.stack([layer.experts.outputs(one)[:, 0].mean(0) for one in mean]).expand(5, 2, 4).transpose(0, 1)
    torch.testing.assert_close(layer(x), expected)


def test_soft_leaves_padding_and_other_sequences_out():
    layer = Engine("soft", experts=4, top_k=1).moe(4, 4).eval()
    x, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    y = layer(x, mask)
    torch.testing.assert_close(y[1:, :3], layer(x[1:, :3]))
    torch.testing.assert_close(y[:1], layer(x[:1]))
    assert not y[1, 3:].any()
    alone = layer(x[0])  # each a sequence of its own: a dense mixture
    torch.testing.assert_close(alone[2], layer(x[0, 2:3])[0])


@pytest.mark.parametrize("router", ["expert_choice", "sinkhorn", "soft"])
def test_a_router_that_sees_later_tokens_is_refused_in_a_causal_layer(router):
    with pytest.raises(UsageError, match=f"{router}.*later tokens.*{router}.allow_noncausal"):
        Engine(router, experts=4, top_k=1).moe(4, 4, causal=True)
    Engine(router, [f"{router}.allow_noncausal=true"], experts=4, top_k=1).moe(4, 4, causal=True)


def test_soft_has_no_capacity():
    with pytest.raises(UsageError, match="^soft .*set neither capacity nor eval_capacity"):
        Engine("soft", experts=4, top_k=1, capacity=1.0).moe(4, 4)


def test_top_p_counts_equal_probabilities_without_rounding_and_takes_all_at_one():
    for experts, p in ((5, 0.4), (15, 0.4), (10, 0.2), (15, 0.8), (40, 0.7)):
        chosen = route("top_p", torch.zeros(1, experts), [f"top_p.p={p}"], top_k=1).load.sum()
        assert chosen == int(p * experts + 1e-9) + 1
    assert route("top_p", 5 * torch.randn(500, 64), ["top_p.p=1"], top_k=1).load.sum() == 500 * 64


def test_sinkhorn_takes_an_expert_that_is_far_behind():
    logits = torch.randn(64, 4)
    even, far = (route("sinkhorn", logits + shift, top_k=1) for shift in (0, torch.tensor([-150.0, 0, 0, 0])))
    assert (even.chosen() == far.chosen()).float().mean() > 0.98


def test_threshold_chooses_by_scores_that_no_sigmoid_has_rounded():
    layer = Engine("threshold", ["threshold.tau=100"], experts=2, top_k=1).moe(2, 4)
    layer.router.weight.data[:] = torch.eye(2)
    layer.router.G.data[:] = 0.3
    assert layer.route(layer.tokens(torch.tensor([[1.0, 0.0]]))).chosen().tolist() == [[1, 0]]


def test_hash_needs_as_many_experts_as_a_token_chooses():
    engine, _ = hashed(experts=2)
    with pytest.raises(UsageError, match=r"^hash .* 2 different experts|top_k is 2"):
        engine.grow(Growth("m", drop=(1,)))


def test_expert_choice_has_no_capacity():
    with pytest.raises(UsageError, match="^expert_choice .*set neither capacity nor eval_capacity"):
        Engine("expert_choice", experts=4, top_k=1, capacity=1.0).moe(4, 4)


def test_soft_mixes_in_fp32_under_autocast():
    layer = Engine("soft", experts=4, top_k=1).moe(16, 8)
    x = torch.randn(2, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x), layer.route(layer.tokens(x))
    assert routing.slots.dispatch.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.02, rtol=0.02)
