"""How many assignments an expert keeps, and which."""

import pytest
import torch

from moe_engine import Engine


@pytest.mark.parametrize(
    ("capacity", "tokens", "top_k", "experts", "limit"),
    [
        (1.0, 8, 1, 4, 2),
        (1.25, 8, 2, 4, 5),
        (1.1, 50, 2, 10, 11),
        (0.3, 10, 1, 3, 1),
        (100.0, 6, 2, 4, 6),
        (1 / 3, 9, 2, 4, 2),
    ],
)
def test_capacity_keeps_at_most_its_share(capacity, tokens, top_k, experts, limit):
    """Equal tokens all want the same experts; each keeps ceil(C T K / E), counted in whole numbers."""
    engine = Engine("topk", experts=experts, top_k=top_k, capacity=capacity)
    layer = engine.moe(3, 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.arange(experts)[:, None].float()
    routing = layer.route(layer.tokens(torch.ones(tokens, 3)))
    kept_E = torch.zeros(experts, dtype=torch.long).index_add(0, routing.plan.expert, routing.plan.kept.long())
    assert kept_E.max() == min(limit, tokens)
    assert routing.load.sum() == tokens * top_k
    assert routing.dropped.sum() == tokens * top_k - kept_E.sum()


def test_capacity_keeps_first_choices_first_and_then_earlier_tokens():
    layer = Engine("topk", experts=2, top_k=2, capacity=0.5).moe(2, 4)
    with torch.no_grad():
        layer.router.weight[:] = torch.eye(2)
    # tokens 0 and 2 want expert 0 first, tokens 1 and 3 expert 1 first; each keeps ceil(.5 * 4 * 2 / 2) = 2
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    plan = layer.route(layer.tokens(x)).plan
    assert plan.kept.view(4, 2).tolist() == [[True, False]] * 4


def test_capacity_drops_nothing_in_eval_and_a_dropped_token_gives_zero():
    layer = Engine("topk", experts=4, top_k=1, capacity=0.01).moe(3, 4)
    x = torch.ones(8, 3)
    assert (layer(x).abs().sum(-1) > 0).sum() <= 4
    assert (layer.eval()(x).abs().sum(-1) > 0).all()


def test_a_causal_layer_drops_no_token_for_a_later_one():
    """Tokens 0 and 1 choose expert 0 second, token 2 first; there is room for two, so token 2 must be dropped."""
    x = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [2.0, 0.0, 1.0]])

    def kept(causal):
        layer = Engine("topk", experts=3, top_k=2, capacity=1.0, causal=causal).moe(3, 4)
        with torch.no_grad():
            layer.router.weight[:] = torch.eye(3)
        plan = layer.route(layer.tokens(x)).plan
        return plan.kept[plan.expert == 0].tolist()

    assert kept(causal=True) == [True, True, False]
    assert kept(causal=False) == [True, False, True]
