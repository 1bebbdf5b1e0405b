"""For the same weights the layer is transformers' blocks; where it is not, a test names the difference.

Tests named `test_differs_...` hold a difference that is meant to stay.
"""

import pytest
import torch
from torch.nn import functional as F

from moe_engine import Engine

pytest.importorskip("transformers")
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe

DIM, HIDDEN, EXPERTS = 24, 16, 8
LOAD_LOSSES = pytest.mark.parametrize("theirs", [mixtral, olmoe], ids=["mixtral", "olmoe"])


def mixtral_pair(top_k=2, **config):
    """(layer, block) with one set of weights."""
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN}
    sizes |= {"num_local_experts": EXPERTS, "num_experts_per_tok": top_k}
    block = filled(mixtral.MixtralSparseMoeBlock, mixtral.MixtralConfig(**sizes, **config))
    return same_weights(build("topk", top_k=top_k), block), block


def olmoe_pair(top_k=2):
    """The same without renormalised gates."""
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN}
    sizes |= {"num_experts": EXPERTS, "num_experts_per_tok": top_k}
    block = filled(olmoe.OlmoeSparseMoeBlock, olmoe.OlmoeConfig(**sizes, norm_topk_prob=False))
    return same_weights(build("topk", ["topk.renorm=false"], top_k=top_k), block), block


def deepseek_pair(bias=(0.3, 0.0, 0.1, 0.05, 0.0, 0.2, 0.15, 0.25), groups=4, kept=2, top_k=4):
    """Sigmoid scores, groups, a selection bias and a shared expert as wide as two."""
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "n_shared_experts": 2}
    choice = {"num_experts_per_tok": top_k, "n_group": groups, "topk_group": kept, "routed_scaling_factor": 2.5}
    block = filled(deepseek.DeepseekV3MoE, deepseek.DeepseekV3Config(**sizes, **choice, norm_topk_prob=True))
    settings = [f"sigmoid_topk.{option}" for option in ("scale=2.5", f"groups={groups}", f"groups_kept={kept}")]
    layer = same_weights(build("sigmoid_topk,loss_free", settings, top_k=top_k, shared=2), block)
    shared = block.shared_experts
    with torch.no_grad():
        layer.shared.enter.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        layer.shared.leave.weight.copy_(shared.down_proj.weight)
        block.gate.e_score_correction_bias.copy_(torch.tensor(bias))
        layer.biases[0]["loss_free"].b.copy_(torch.tensor(bias))
    return layer, block


PAIRS = pytest.mark.parametrize("pair", [mixtral_pair, olmoe_pair, deepseek_pair], ids=["mixtral", "olmoe", "deepseek"])


def build(plugins, settings=(), **spec):
    return Engine(plugins, settings, experts=EXPERTS, activation="swiglu", **spec).moe(DIM, HIDDEN)


def filled(kind, config):
    """A block, which transformers leaves uninitialised, with random weights."""
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = kind(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def same_weights(layer, block):
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        layer.experts.w_in.copy_(block.experts.gate_up_proj.mT)
        layer.experts.w_out.copy_(block.experts.down_proj.mT)
    return layer


def inputs(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def gradients(module, x, at):
    """Of a loss that weighs every output differently."""
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((y * weights).sum(), [x, *at])


def switch_aux(layer, x, mask=None):
    """The unweighted load-balancing loss of a layer built with `switch_aux`."""
    return layer.aux_terms(layer.route(layer.tokens(x, mask)))["switch_aux"]


# -- what is the same --------------------------------------------------------------------------------


@PAIRS
def test_output(pair):
    """[B, S, D] in, the block's output out."""
    layer, block = pair()
    x = inputs(3, 20)
    assert_close(layer(x), block(x))


@PAIRS
def test_gradients_of_input_and_router(pair):
    """Both receive the block's gradients, through gates and experts."""
    layer, block = pair()
    x = inputs(3, 20)
    ours = gradients(layer, x, [layer.router.weight])
    theirs = gradients(block, x, [block.gate.weight])
    assert_close(ours, theirs)
    assert theirs[1].abs().sum() > 1


@PAIRS
def test_gradients_of_experts(pair):
    """The experts' weights receive the block's gradients, transposed as they are stored."""
    layer, block = pair()
    x = inputs(3, 20)
    _, w_in, w_out = gradients(layer, x, [layer.experts.w_in, layer.experts.w_out])
    _, gate_up, down = gradients(block, x, [block.experts.gate_up_proj, block.experts.down_proj])
    assert_close(w_in.mT, gate_up)
    assert_close(w_out.mT, down)


def test_gradients_of_shared_expert():
    """DeepSeek's shared expert receives its block's gradients."""
    layer, block = deepseek_pair()
    x, shared = inputs(3, 20), block.shared_experts
    _, enter, leave = gradients(layer, x, [layer.shared.enter.weight, layer.shared.leave.weight])
    _, gate, up, down = gradients(block, x, [m.weight for m in (shared.gate_proj, shared.up_proj, shared.down_proj)])
    assert_close(enter, torch.cat([gate, up]))
    assert_close(leave, down)


def test_selection_bias_moves_deepseeks_choice():
    """The agreement above is one with a bias at work: without it, other experts are chosen."""
    layer, block = deepseek_pair()
    x = inputs(3, 20)
    block.gate.e_score_correction_bias.zero_()
    assert (layer(x) - block(x)).abs().max() > 0.1


@LOAD_LOSSES
def test_load_loss_leaves_padding_out(theirs):
    """As theirs does with an attention mask, up to the factor K that is shown below."""
    layer, x = build("topk,switch_aux", top_k=2), inputs(3, 20)
    mask = torch.arange(20) < torch.tensor([20, 7, 13])[:, None]
    logits = F.linear(x.flatten(0, 1), layer.router.weight)
    assert_close(2 * switch_aux(layer, x, mask), theirs.load_balancing_loss_func((logits,), EXPERTS, 2, mask.long()))


def test_load_loss_teaches_the_router_the_same():
    """A training step's gradient is that of Mixtral's loss, with `weight` K times its coefficient."""
    engine = Engine("topk,switch_aux", ["switch_aux.weight=0.2"], experts=EXPERTS, top_k=2, activation="swiglu")
    layer, (_, block), x = engine.moe(DIM, HIDDEN), mixtral_pair(), inputs(3, 20)
    same_weights(layer, block)
    (layer(x).sum() + engine.aux_loss()).backward()
    logits = F.linear(x.detach().flatten(0, 1), block.gate.weight)
    (block(x.detach()).sum() + 0.1 * mixtral.load_balancing_loss_func((logits,), EXPERTS, 2)).backward()
    assert_close(layer.router.weight.grad, block.gate.weight.grad)


# -- what is not, and is meant not to be ---------------------------------------------------------------


@LOAD_LOSSES
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_differs_load_loss_by_factor_k(theirs, top_k):
    """Theirs does not divide the load by K: for one layer it is K times `switch_aux`."""
    layer, x = build("topk,switch_aux", top_k=top_k), inputs(3, 20)
    logits = F.linear(x.flatten(0, 1), layer.router.weight)
    assert_close(top_k * switch_aux(layer, x), theirs.load_balancing_loss_func((logits,), EXPERTS, top_k))


def test_differs_load_loss_per_layer():
    """Theirs pools layers before it multiplies f and P: layers that collapse onto different experts look balanced.

    Four layers, each with all its tokens on one of four experts: 1 there, which is perfect balance,
    and 4 here, which is the worst there is.
    """
    engine = Engine("topk,switch_aux", experts=4, top_k=1)
    layers, x = [engine.moe(DIM, HIDDEN) for _ in range(4)], inputs(20).detach().abs()
    for index, layer in enumerate(layers):
        layer.router.weight.data = 100 * F.one_hot(torch.tensor(index), 4).float()[:, None].expand(4, DIM)
    logits = tuple(F.linear(x, layer.router.weight) for layer in layers)
    assert_close(mixtral.load_balancing_loss_func(logits, 4, 1), torch.tensor(1.0))
    assert_close(torch.stack([switch_aux(layer, x) for layer in layers]).mean(), torch.tensor(4.0))


def test_differs_single_gate():
    """At K = 1 theirs divides the gate by itself: its router gets no gradient. Here it keeps its probability."""
    layer, block = mixtral_pair(top_k=1)
    x = inputs(3, 20)
    assert gradients(block, x, [block.gate.weight])[1].abs().max() < 1e-4
    assert gradients(layer, x, [layer.router.weight])[1].abs().max() > 0.1


def test_differs_jitter():
    """Mixtral's jitter, where set, changes the caller's tensor; the layer never changes its input."""
    layer, block = mixtral_pair(router_jitter_noise=0.1)
    x = inputs(3, 20).detach()
    before = x.clone()
    layer.train()(x)
    assert torch.equal(x, before)
    block.train()(x)
    assert not torch.equal(x, before)


def deepseek_choice(block, x, outside):
    """Its experts [T, E] as 0 and 1, with `outside` as the score of the experts in groups that are not kept."""
    scores_TE = F.linear(x.flatten(0, 1), block.gate.weight).sigmoid() + block.gate.e_score_correction_bias
    groups_TG = scores_TE.view(-1, 4, 2).sum(-1)
    closed_TG = torch.ones_like(groups_TG).scatter(1, groups_TG.topk(2).indices, 0).bool()
    best_TK = scores_TE.masked_fill(closed_TG.repeat_interleave(2, dim=1), outside).topk(4).indices
    return torch.zeros_like(scores_TE).scatter(1, best_TK, 1)


def test_differs_negative_scores():
    """transformers 5.0 masks the groups that are not kept by 0, which beats negative scores; here it is -inf.

    With the bias at -2 every score is negative, and a mask by 0 fills up with experts of the wrong
    groups. Later versions mask by -inf too: the outputs differ there, or nowhere.
    """
    layer, block = deepseek_pair(bias=(-2.0,) * EXPERTS)
    x = inputs(3, 20).detach()
    by_zero_TE, by_inf_TE = (deepseek_choice(block, x, outside) for outside in (0.0, -torch.inf))
    wrong_T = (by_zero_TE != by_inf_TE).any(-1)
    differs_T = (layer(x) - block(x)).flatten(0, 1).abs().amax(-1) > 1e-4
    assert wrong_T.any()
    assert torch.equal(layer.route(layer.tokens(x)).chosen(), by_inf_TE)
    assert torch.equal(differs_T, wrong_T) or not differs_T.any()


def test_differs_group_score():
    """A group's score is the sum of its best K / kept experts here, as published, and of its best two there.

    With K = kept the best expert's group is always kept; theirs closes it where two others add up to more.
    """
    layer, block = deepseek_pair(bias=(0.0,) * EXPERTS, kept=2, top_k=2)
    x = inputs(3, 20).detach()
    best_T = F.linear(x.flatten(0, 1), layer.router.weight).argmax(-1)
    assert torch.equal(layer.route(layer.tokens(x)).plan.expert.view(-1, 2)[:, 0], best_T)
    assert (layer(x) - block(x)).abs().max() > 0.1
