"""Specs that are refused, and scores to select by."""

import pytest
import torch

from moe_engine import Engine
from support import refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"experts": 0}, ["at least one expert"]),
        ({"experts": 4, "top_k": 5}, ["top_k", "5", "1 to 4"]),
        ({"capacity": 0.0}, ["capacity", "0.0", "1e-6 to 1e6"]),
        ({"activation": "tanh"}, ["activation", "'tanh'", "relu", "gelu", "swiglu"]),
        ({"expertz": 4}, ["expertz"]),
    ],
)
def test_a_bad_spec_is_refused(spec, words):
    with refused("bad-layer-spec", *words):
        Engine("topk", **spec).moe(6, 8)


def test_a_masked_score_stays_masked_in_select_by():
    layer = Engine("topk", experts=3, top_k=2).moe(6, 4)
    level = layer.route(layer.tokens(torch.randn(50, 6))).levels[0]
    scores = torch.randn(50, 3).index_fill(1, torch.tensor([0]), -torch.inf)
    assert (level.select_by(scores).topk(2).indices != 0).all()
