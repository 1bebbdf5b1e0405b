"""Routers on numbers small enough to check on paper."""

import pytest
import torch

from moe_engine import Engine, UsageError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def route(plugins, logits, settings=(), bias=None, **spec):
    """The routing of given raw logits: rows are the identity, so that x is the logits."""
    engine = Engine(plugins, settings, experts=logits.shape[-1], **spec)
    layer = engine.moe(logits.shape[-1], 4)
    with torch.no_grad():
        layer.router.rows[:] = torch.eye(logits.shape[-1])
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
        layer.router.group_rows[:, 0] = torch.tensor(logits_group)
        layer.router.rows[:, 0] = torch.tensor(logits_leaf)
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
        layer.router.group_rows[:, 0] = torch.tensor([9.0, 0.0])
        layer.router.rows[:, 0] = torch.tensor([9.0, 0.0, 0.0, 0.0])
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
        (["hierarchical.groups=8"], {}, "hold too few"),
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
