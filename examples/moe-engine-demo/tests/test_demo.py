"""cosine passes the conformance tests of a router, and one test more."""

import pytest
import torch
from moe_engine import Engine
from moe_engine.testing import checks


@pytest.mark.parametrize("check", checks("cosine"), ids=str)
def test_cosine(check):
    check()


def test_the_length_of_a_token_has_no_say():
    """Ten times as long, it goes where it went, with the same gates; along an expert's row its logit is 1 / 0.2."""
    layer = Engine("cosine", experts=4, top_k=2).moe(6, 8)
    x = torch.randn(9, 6)
    near, far = (layer.route(layer.tokens(value)) for value in (x, 10 * x))
    torch.testing.assert_close(near.gates(), far.gates())
    along = layer.route(layer.tokens(3 * layer.router.weight.detach()))
    torch.testing.assert_close(torch.full((4,), 5.0), along.levels[0].logits.diagonal())
