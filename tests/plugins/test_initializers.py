"""Initializers that use their parent's tokens or its hidden units."""

import pytest
import torch

from moe_engine import Engine, Growth


def grown(initializer, settings=(), x=None, seed=0, **spec):
    """(layer, weights before, record, tokens) of one growth of expert 1 of three."""
    torch.manual_seed(seed)
    engine = Engine(f"topk,{initializer}", settings, top_k=1, **spec)
    layer = engine.moe(8, 10, experts=3, name="m")
    x = torch.rand(600, 8) if x is None else x
    before = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    record = engine.grow(Growth("m", parents=(1,)), probe=lambda: layer.eval()(x).sum())
    return layer, before, record, x


def test_pca_split_halves_the_parents_tokens_along_their_principal_direction():
    torch.manual_seed(1)
    x = torch.rand(9000, 8)
    x[:, 3] *= 6  # the direction of largest spread, and not an even one
    x[:, 3] = x[:, 3] ** 2 / 6
    x[:, 0] = 1 + x[:, 0] / 100  # nearly even over tokens, so that it can stand for a bias
    layer, before, _, _ = grown("pca_split", x=x)
    was = (x @ before["router.weight"].t()).argmax(-1) == 1
    rows = layer.router.weight.detach()
    routed = x[was]
    to_child = routed @ rows[3] > routed @ rows[1]
    assert was.sum() > 50
    assert abs(float(to_child.float().mean()) - 0.5) < 0.02
    torch.testing.assert_close((rows[1] + rows[3]) / 2, before["router.weight"][1])
    apart = routed @ (rows[3] - rows[1])
    torch.testing.assert_close(apart.std(), torch.tensor(1.0), atol=1e-3, rtol=0)  # 2 delta
    _, axes = torch.linalg.eigh(torch.cov(routed.t()))
    assert abs(float(torch.corrcoef(torch.stack([apart, routed @ axes[:, -1]]))[0, 1])) > 0.98
    torch.testing.assert_close(layer.experts.w_in[3], before["experts.w_in"][1])


def test_pca_split_parts_two_blobs():
    torch.manual_seed(0)
    side = torch.arange(400) % 2
    x = torch.ones(400, 8) + 0.05 * torch.randn(400, 8) + side[:, None] * torch.eye(8)[2] * 2
    engine = Engine("topk,pca_split", top_k=1)
    layer = engine.moe(8, 10, experts=1, name="m")
    engine.grow(Growth("m", parents=(0,)), probe=lambda: layer.eval()(x).sum())
    chosen = layer.route(layer.tokens(x)).plan.expert
    assert max(int((chosen == side).sum()), int((chosen != side).sum())) == 400


def test_pca_split_draws_a_direction_where_there_are_no_tokens():
    layer, before, _, _ = grown("pca_split", x=torch.zeros(2, 8))
    assert not torch.equal(layer.router.weight[3], before["router.weight"][1])
    torch.testing.assert_close((layer.router.weight[1] + layer.router.weight[3]) / 2, before["router.weight"][1])


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_exclusive_split_parts_the_hidden_units(activation):
    """The two together are the old expert, and each has half of the units that leave."""
    layer, before, _, x = grown("exclusive_split", activation=activation, bias=True)
    rows = layer.experts.w_out.detach()
    kept = [rows[at].abs().sum(-1) > 0 for at in (1, 3)]
    assert kept[0].sum() == kept[1].sum() == 5 and not (kept[0] & kept[1]).any()
    torch.testing.assert_close(rows[1] + rows[3], before["experts.w_out"][1])
    outputs = layer.experts.outputs(x[:5]).detach()
    layer.experts.w_out.data[1], layer.experts.b_out.data[1] = before["experts.w_out"][1], before["experts.b_out"][1]
    torch.testing.assert_close(outputs[1] + outputs[3], layer.experts.outputs(x[:5])[1].detach())


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_partial_reinit_redraws_the_same_hidden_units_everywhere(activation):
    share = ["partial_reinit.share=0.3"]
    layer, before, _, _ = grown("partial_reinit", share, activation=activation, bias=True)
    new_out = (layer.experts.w_out[3] != before["experts.w_out"][1]).all(-1)
    new_in = (layer.experts.w_in[3] != before["experts.w_in"][1]).all(0)
    new_bias = layer.experts.b_in[3] != before["experts.b_in"][1]
    assert new_out.sum() == 3
    assert torch.equal(new_in.view(-1, 10), new_out.expand(len(new_in) // 10, 10))
    assert torch.equal(new_bias, new_in)
    torch.testing.assert_close(layer.experts.w_out[3][~new_out], before["experts.w_out"][1][~new_out])
    torch.testing.assert_close(layer.router.weight[3], before["router.weight"][1])


def test_partial_reinit_draws_with_the_moments_of_what_it_replaces():
    torch.manual_seed(0)
    engine = Engine("topk,partial_reinit", ["partial_reinit.share=1"], top_k=1)
    layer = engine.moe(64, 200, experts=2, name="m")
    layer.experts.w_in.data[1] = 3 + 0.5 * torch.randn(64, 200)
    engine.grow(Growth("m", parents=(1,)))
    torch.testing.assert_close(layer.experts.w_in[2].mean(), torch.tensor(3.0), atol=0.02, rtol=0)
    torch.testing.assert_close(layer.experts.w_in[2].std(), torch.tensor(0.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("initializer", ["exclusive_split", "partial_reinit", "pca_split"])
def test_whole_groups_grow_too(initializer):
    engine = Engine(f"hierarchical,{initializer}", experts=4, top_k=1)
    layer = engine.moe(6, 4, name="m")
    engine.grow(Growth("m", parents=(0,), of="group"))
    assert layer.router.group_of.bincount().tolist() == [2, 2, 2]


def test_pca_split_parts_what_mixes_tokens_too_and_draws_where_all_tokens_are_equal():
    torch.manual_seed(0)
    engine = Engine("soft,pca_split", top_k=1)
    layer = engine.moe(6, 4, experts=2, name="m")
    x = torch.randn(3, 5, 6)
    engine.grow(Growth("m", parents=(0,)), probe=lambda: layer.eval()(x).sum())
    assert (layer.router.phi[0] - layer.router.phi[2]).abs().max() > 0.01
    layer, _, _, _ = grown("pca_split", x=torch.randn(1, 8).repeat(16, 1))
    assert not torch.equal(layer.router.weight[3], layer.router.weight[1])
