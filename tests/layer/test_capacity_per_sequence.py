"""Capacity of each sequence by itself, and in evaluation."""

import pytest
import torch

from moe_engine import Engine
from support import refused

D, H, E, B, S = 24, 16, 8, 3, 20


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_the_block_of_switch_transformers(training):
    """Which keeps 3 tokens of each sequence per expert, in training and evaluation."""
    name = "transformers.models.switch_transformers"
    config = pytest.importorskip(f"{name}.configuration_switch_transformers").SwitchTransformersConfig(
        **{"d_model": D, "d_ff": H, "num_experts": E, "expert_capacity": 3, "router_bias": True},
        **{"router_jitter_noise": 0.0, "dropout_rate": 0.0, "dense_act_fn": "relu"},
    )
    torch.manual_seed(0)
    block = pytest.importorskip(f"{name}.modeling_switch_transformers").SwitchTransformersSparseMLP(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    spec = {"top_k": 1, "capacity_per": "sequence", "capacity" if training else "eval_capacity": 3 * E / S}
    layer = Engine("topk", ["topk.router_bias=true"], experts=E, **spec).moe(D, H).train(training)
    block.train(training)
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    with torch.no_grad():
        layer.router.weight.copy_(block.router.classifier.weight)
        layer.router.bias.copy_(block.router.classifier.bias)
        layer.experts.w_in.copy_(torch.stack([one.wi.weight.t() for one in experts]))
        layer.experts.w_out.copy_(torch.stack([one.wo.weight.t() for one in experts]))
    x, weight = torch.randn(B, S, D, requires_grad=True), torch.randn(B, S, D)
    y, expected = layer(x), block(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((y * weight).sum(), [x, layer.router.weight, layer.router.bias, layer.experts.w_in])
    inputs = [x, block.router.classifier.weight, block.router.classifier.bias, *(one.wi.weight for one in experts)]
    grads = torch.autograd.grad((expected * weight).sum(), inputs)
    theirs = [*grads[:3], torch.stack([grad.t() for grad in grads[3:]])]
    torch.testing.assert_close(ours, tuple(theirs), rtol=1e-5, atol=1e-5)
    assert 5 < layer.route(layer.tokens(x)).dropped.sum() < B * S // 2


def with_equal_choices(**spec):
    """A layer in which every token chooses expert 0 first and expert 1 second."""
    layer = Engine("topk", experts=4, **{"top_k": 1, **spec}).moe(3, 4)
    with torch.no_grad():
        layer.router.weight[:] = -torch.arange(4.0)[:, None]
    return layer


def kept(layer, shape, mask=None):
    """How many of each token's assignments are kept."""
    tokens = layer.tokens(torch.ones(*shape, 3), mask)
    plan = layer.route(tokens).plan
    kept_T = torch.zeros(tokens.x.shape[0], dtype=torch.long).index_add(0, plan.token, plan.kept.long())
    return kept_T.view(shape).tolist()


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()


def test_each_sequence_has_a_limit_of_its_own_real_tokens():
    """At C 1.6 and 4 experts, 5, 3, 0 and 1 tokens leave ceil(2), ceil(1.2), 0 and ceil(.4) places in an expert."""
    layer = with_equal_choices(capacity=1.6, capacity_per="sequence")
    assert kept(layer, (4, 5), MASK) == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [0, 1, 0, 0, 0]]
    whole = with_equal_choices(capacity=1.6)  # ceil(1.6 * 9 / 4) = 4 places
    assert kept(whole, (4, 5), MASK) == [[1, 1, 1, 1, 0], [0] * 5, [0] * 5, [0] * 5]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_keeps_what_its_sequences_keep_one_by_one(top_k, causal):
    torch.manual_seed(0)
    spec = {"top_k": top_k, "capacity": 0.7, "causal": causal}
    layer = Engine("topk", experts=4, capacity_per="sequence", **spec).moe(3, 4)
    alone = Engine("topk", experts=4, **spec).moe(3, 4)
    alone.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 3, 7, 3), torch.arange(7) < torch.tensor([[[7], [4], [1]], [[0], [6], [2]]])
    y = layer(x, mask)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(y[i, j], alone(x[i, j], mask[i, j]))
    assert layer.route(layer.tokens(x, mask)).dropped.sum() > 5


def test_one_axis_is_one_sequence_and_no_token_is_none():
    layer = with_equal_choices(capacity=1.0, capacity_per="sequence")
    assert kept(layer, (8,)) == [1, 1, 0, 0, 0, 0, 0, 0]
    for shape in ((0, 5), (3, 0), (0,)):
        assert layer(torch.ones(*shape, 3)).shape == (*shape, 3)


def test_evaluation_has_a_capacity_of_its_own():
    layer = with_equal_choices(capacity=1.0, eval_capacity=2.0)
    assert kept(layer, (8,)) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert kept(layer.eval(), (8,)) == [1, 1, 1, 1, 0, 0, 0, 0]
    layer(torch.ones(8, 3))
    only = with_equal_choices(eval_capacity=0.1)
    assert kept(only, (8,)) == [1] * 8
    assert kept(only.eval(), (8,)) == [1] + [0] * 7
    assert (only(torch.ones(8, 3)).abs().sum(-1) > 0).tolist() == [True] + [False] * 7


@pytest.mark.parametrize("per", ["sequence", pytest.param("batch", marks=pytest.mark.long)])
def test_a_compiled_layer_drops_the_same(per):
    torch.manual_seed(0)
    layer = Engine("topk", experts=4, capacity=0.7, eval_capacity=0.7, capacity_per=per).moe(3, 4).eval()
    x = torch.randn(3, 7, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    longer = torch.randn(9, 7, 3)
    torch.testing.assert_close(program.module()(longer), layer(longer))


def test_what_a_capacity_can_be():
    for name in ("capacity", "eval_capacity"):
        with refused("bad-layer-spec", f"{name}=0.0 must be 1e-6 to 1e6"):
            Engine("topk", **{name: 0.0}).moe(3, 4)
    with refused("bad-layer-spec", "capacity_per is 'token'; choose batch or sequence"):
        Engine("topk", capacity_per="token").moe(3, 4)
    for router in ("soft", "expert_choice"):
        with refused("mix-refused", router, "set neither capacity nor eval_capacity"):
            Engine(router, eval_capacity=1.0).moe(3, 4)
