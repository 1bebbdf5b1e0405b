"""Forwards that are not counted."""

import pytest
import torch
from torch import nn

from moe_engine import Engine
from moe_engine.layer.probing import evaluating, observe, uncounted


def test_an_observed_forward_is_not_counted_and_keeps_its_graph():
    engine = Engine("topk,switch_aux", experts=4)
    layer = engine.moe(6, 8, name="moe")
    x = torch.randn(9, 6)
    loss, routings = observe([layer], lambda: layer(x).square().mean())
    assert list(routings) == [layer]
    (grad,) = torch.autograd.grad(loss, [routings[layer].levels[0].logits])
    assert grad.abs().sum() > 0
    assert engine.metrics() == {} and layer.watched is None


def test_counting_starts_again_after_an_error():
    layer = Engine("topk", experts=4).moe(6, 8)
    with pytest.raises(LookupError), uncounted([layer]):
        raise LookupError
    assert layer.watched is None


def test_each_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
