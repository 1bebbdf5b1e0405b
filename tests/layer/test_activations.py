"""Gradients by hand are those of autograd."""

import pytest
import torch

from moe_engine.layer.activations import ACTIVATIONS, MANUAL_ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_manual_form_agrees_with_autograd(name):
    a = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    h = ACTIVATIONS[name](a)
    d = torch.randn_like(h)
    (expected,) = torch.autograd.grad(h, a, d)
    manual, kept = MANUAL_ACTIVATIONS[name], a.detach().clone()
    torch.testing.assert_close(manual.forward(kept), h.detach())
    torch.testing.assert_close(manual.recompute(kept), h.detach())
    torch.testing.assert_close(manual.backward(kept, d.clone()), expected)
