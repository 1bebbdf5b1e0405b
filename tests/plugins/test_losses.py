"""Losses at balance, at collapse, and by their gradients."""

import math

import pytest
import torch

from moe_engine import Engine

E = 4


def term(name, logits, top_k=1, mask=None):
    """A loss of given raw logits [T, E], and the gradient at them."""
    engine = Engine(f"topk,{name}", experts=E, top_k=top_k)
    layer = engine.moe(E, 4)
    with torch.no_grad():
        layer.router.rows[:] = torch.eye(E)
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
    engine = Engine("hierarchical,saturation,z_loss", ["saturation.form=published"], experts=E, top_k=1)
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
            layer.router.rows.zero_()
            layer.router.rows[index] = 60.0
        layer(torch.ones(8, E))
    torch.testing.assert_close(engine.aux_loss(), torch.tensor(float(E)))


def test_a_layer_may_have_a_weight_of_its_own():
    engine = Engine("topk,switch_aux", experts=E, top_k=1)
    usual = engine.moe(6, 4)
    usual(torch.randn(5, 6))
    assert usual.aux_value > 0
    silent = engine.moe(6, 4, settings=["switch_aux.weight=0"])
    silent(torch.randn(5, 6))
    assert silent.aux_value == 0
