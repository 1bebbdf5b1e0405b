"""A choice is exact: a reference in NumPy chooses the same from the same scores, whatever batch, place and padding are.

Scores are compared, not experts: equal scores may be parted either way.
"""

import numpy as np
import pytest
import torch

from moe_engine import Engine, Growth, adam
from moe_engine.contract.routing import Level, Tokens

TOP_K, GROUPS, KEPT, MASS = 4, 4, 2, 0.7
ROUTERS = {
    "topk": [],
    "topk of groups": [f"topk.groups={GROUPS}", f"topk.groups_kept={KEPT}"],
    "sigmoid_topk": [],
    "sigmoid_topk of groups": [f"sigmoid_topk.groups={GROUPS}", f"sigmoid_topk.groups_kept={KEPT}"],
    "hierarchical": [f"hierarchical.groups={GROUPS}", f"hierarchical.groups_kept={KEPT}"],
    "top_p": [f"top_p.p={MASS}"],
    "threshold": [],
    "relu": [],
    "expert_choice": [],
}


def built(name, experts, scale=1.0):
    """A layer in eval mode whose logits are about `scale` in size."""
    torch.manual_seed(0)
    layer = Engine(name.split()[0], ROUTERS[name], experts=experts, top_k=TOP_K).moe(16, 4).eval()
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter, 0, scale / 4)
    return layer


def routed(layer, x, mask=None):
    with torch.no_grad():
        return layer.route(layer.tokens(x, mask))


def best(scores, count=None):
    """The largest in each row, in order; nan comes last."""
    return -np.sort(-scores, axis=-1)[..., :count]


def chosen_of(routing):
    return routing.chosen().bool().numpy()


# -- what each router takes the top of, and what it took: two arrays that must be equal ---------------------


def of_top_k(layer, routing):
    scores, plan = routing.levels[0].scores.numpy(), routing.plan
    assert plan.rank.tolist()[:TOP_K] == list(range(TOP_K))
    yield scores[plan.token, plan.expert].reshape(-1, TOP_K), best(scores, TOP_K)


def grouped(table):
    return table.reshape(len(table), GROUPS, -1)


def of_groups(layer, routing):
    """The best of the two groups whose best two have the largest sum."""
    scores, chosen = grouped(routing.levels[0].scores.numpy()), grouped(chosen_of(routing))
    sums = best(scores, TOP_K // KEPT).sum(-1, dtype=np.float64)
    edge = best(sums, KEPT + 1)
    assert (np.where(chosen.any(-1), sums, np.inf) >= edge[:, KEPT - 1 : KEPT]).all()
    clear = edge[:, KEPT - 1] > edge[:, KEPT]  # otherwise which of equal groups is open is free
    expected = np.where((sums >= edge[:, KEPT - 1 : KEPT])[..., None], scores, -np.inf).reshape(len(scores), -1)
    taken = np.where(chosen, scores, np.nan).reshape(len(scores), -1)
    yield best(taken, TOP_K)[clear], best(expected, TOP_K)[clear]


def of_two_levels(layer, routing):
    """The best two groups, and the best two experts in each."""
    group, scores = routing.levels[0].scores.numpy(), grouped(routing.levels[1].scores.numpy())
    chosen, each = grouped(chosen_of(routing)), TOP_K // KEPT
    kept = chosen.any(-1)
    yield best(np.where(kept, group, np.nan), KEPT), best(group, KEPT)
    yield best(np.where(chosen, scores, np.nan))[kept][:, :each], best(scores, each)[kept]
    yield chosen.sum((1, 2)), np.full(len(scores), TOP_K)


def of_top_p(layer, routing):
    scores = routing.levels[0].scores.numpy()
    ordered = best(scores)
    before = np.cumsum(ordered, -1, dtype=np.float64) - ordered
    yield best(np.where(chosen_of(routing), scores, np.nan)), np.where(before <= MASS + 2**-20, ordered, np.nan)


def of_threshold(layer, routing):
    over = routing.levels[0].logits.numpy() - layer.router.G.detach().numpy()
    expected = np.where((over > 0).any(-1, keepdims=True), over > 0, over == over.max(-1, keepdims=True))
    yield chosen_of(routing), expected


def of_relu(layer, routing):
    yield chosen_of(routing), routing.levels[0].logits.numpy() > 0


def of_expert_choice(layer, routing):
    scores, chosen = routing.levels[0].scores.numpy().T, chosen_of(routing).T
    count = round(scores.shape[1] * TOP_K / len(scores))
    yield best(np.where(chosen, scores, np.nan), count), best(scores, count)
    yield chosen.sum(-1), np.full(len(scores), count)


CHECKS = {"topk": of_top_k, "sigmoid_topk": of_top_k, "top_p": of_top_p, "threshold": of_threshold, "relu": of_relu}
CHECKS |= {"hierarchical": of_two_levels, "expert_choice": of_expert_choice}
CHECKS |= {name: of_groups for name in ROUTERS if name.endswith("groups")}


def check(name, experts, scale, tokens):
    layer = built(name, experts, scale)
    routing = routed(layer, torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1)))
    for found, expected in CHECKS[name](layer, routing):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("experts", [8, 64, 512])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_larger_score_always_wins(name, experts, scale):
    check(name, experts, scale, 1000)


@pytest.mark.long
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("experts", [8, 64, 512])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_larger_score_always_wins_for_a_hundred_thousand_tokens(name, experts, scale):
    check(name, experts, scale, 100_000)


# -- batch, place and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0])
@pytest.mark.parametrize("experts", [8, 256])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_order_padding_and_batch_size_change_no_choice(name, experts, scale):
    """Logits are handed in, because those of one row may round differently from those of many."""
    layer = built(name, experts, scale)
    x, order = torch.randn(300, 16), torch.randperm(300)
    logits = [level.logits for level in routed(layer, x).levels]

    def choices(rows, mask=None):
        layer.router.score = lambda tokens: tuple(level[rows] for level in logits)
        return routed(layer, x[rows], mask).chosen()

    whole = choices(slice(None))
    assert torch.equal(choices(order), whole[order])
    assert torch.equal(torch.cat([choices([row]) for row in range(50)]), whole[:50])
    mask = torch.rand(300) < 0.7
    assert torch.equal(choices(slice(None), mask)[mask], whole[mask])
    padded = [0] * 37 + list(range(300))
    assert torch.equal(choices(padded, torch.arange(337) >= 37)[37:], whole)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_outputs_agree_in_any_order_and_with_padding(name):
    layer = built(name, 64)
    x, order = torch.randn(1, 200, 16), torch.randperm(200)
    y = layer(x)
    torch.testing.assert_close(layer(x[:, order]), y[:, order], rtol=1e-5, atol=1e-6)
    mask = torch.arange(237)[None] >= 37
    padded = layer(torch.cat([torch.zeros(1, 37, 16), x], 1), mask)[:, 37:]
    torch.testing.assert_close(padded, y, rtol=1e-5, atol=1e-6)
    alone = torch.cat([layer(x[:, at : at + 1]) for at in range(200)], 1)
    torch.testing.assert_close(alone, y, rtol=1e-5, atol=1e-6)


# -- equal scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("copies", "top_k"), [(2, 1), (4, 1), (8, 2), (16, 4)])
def test_exact_copies_share_evenly(copies, top_k):
    level = level_of(torch.zeros(10_000, copies))
    load = level.select_by(level.logits).topk(top_k).indices.flatten().bincount(minlength=copies)
    assert (load / load.float().mean() - 1).abs().max() < 0.15


def test_a_clone_and_its_parent_share_evenly():
    engine = Engine("topk,clone", experts=16, top_k=1)
    layer = engine.moe(8, 8, name="moe").eval()
    engine.grow(Growth("moe", parents=(0,)), adam(layer, lr=1e-3))
    load = routed(layer, torch.randn(20_000, 8)).load
    assert abs(load[0] / (load[0] + load[16]) - 0.5) < 0.075


def test_levels_draw_independently():
    """Every pair of winners on two levels, and of a group's and an expert's draw, is about equally frequent."""
    tokens = Tokens(torch.randn(40_000, 16), (40_000,))
    scores = torch.zeros(40_000, 8)
    levels = [Level("", scores, scores, tokens, index) for index in range(3)]
    winners = [level.select_by(scores).argmax(-1) for level in levels]
    winners.append(levels[0].part_ties(scores, draw=1).argmax(-1))
    for first, one in enumerate(winners):
        for other in winners[:first]:
            pairs = (8 * one + other).bincount(minlength=64)
            assert (pairs / 625 - 1).abs().max() < 0.2  # five standard deviations


def test_equal_logits_spread_over_groups_and_their_experts():
    layer = Engine("hierarchical", ["hierarchical.groups=8", "hierarchical.groups_kept=4"], experts=64, top_k=8).moe(
        4, 4
    )
    for parameter in layer.eval().router.parameters():
        torch.nn.init.zeros_(parameter)
    load = routed(layer, torch.randn(5000, 4)).load
    assert load.min() > 0 and load.max() / load.mean() < 1.2


def test_identical_tokens_choose_alike():
    layer = built("topk", 64)
    torch.nn.init.zeros_(layer.router.weight)
    chosen = routed(layer, torch.randn(1, 16).expand(100, 16)).chosen()
    assert (chosen == chosen[0]).all()


# -- the values ----------------------------------------------------------------------------------------


def level_of(scores):
    return Level("", scores, scores, Tokens(torch.randn(len(scores), 16), (len(scores),)))


@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(200, 32),
        1 + 1e-6 * torch.randn(200, 32),
        1e38 * torch.randn(200, 32),
        1e-42 * torch.randn(200, 32),
        torch.randn(200, 32).masked_fill(torch.rand(200, 32) < 0.3, -torch.inf),
        torch.randn(200, 32).bfloat16(),
    ],
    ids=["ordinary", "close", "huge", "subnormal", "masked", "bf16"],
)
def test_rounded_to_fp32_they_are_the_scores(scores):
    by = level_of(scores).select_by(scores)
    assert torch.equal(by.float(), scores.float())
    assert (by.sort(-1).values.diff(dim=-1)[by.sort(-1).values[:, 1:].isfinite()] > 0).all()


def test_compiled_they_are_the_same():
    x = torch.randn(50, 16)

    def chosen(x, scores):
        return Level("", scores, scores, Tokens(x, (50,))).select_by(scores).topk(2).indices

    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    for scores in (torch.randn(50, 8), torch.zeros(50, 8)):
        assert torch.equal(compiled(x, scores), chosen(x, scores))


def test_a_last_bit_seldom_changes_a_tokens_lots():
    x = torch.randn(20_000, 64)
    noisy = x * (1 + 2**-24 * torch.randn(20_000, 64).sign())
    assert (Tokens(x, (20_000,)).lots != Tokens(noisy, (20_000,)).lots).float().mean() < 0.01
    assert len(Tokens(x, (20_000,)).lots.unique()) > 19_990
