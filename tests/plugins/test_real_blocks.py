"""Layers are the blocks of real architectures: with the same weights, the same outputs and gradients.

Each block is transformers' own, tiny and with random weights.
"""

import attrs
import pytest
import torch
from torch.nn import functional as F

from moe_engine import Engine, Growth, UsageError
from support import refused

DIM, HIDDEN, EXPERTS = 24, 16, 8
BIAS = (0.03, 0.0, 0.01, 0.06, 0.0, 0.02, 0.09, 0.04)  # of selection; on probabilities, which are small


@attrs.define
class Pair:
    """A layer and a block. ties: a parameter of the layer, its value or gradient made of the block's, and those."""

    layer: torch.nn.Module
    block: torch.nn.Module
    call: object = None
    ties: list = attrs.Factory(list)

    def tie(self, ours, *theirs, by=lambda weight: weight):
        self.ties.append((ours, by, theirs))
        with torch.no_grad():
            ours.copy_(by(*theirs))

    def theirs(self, x):
        y = self.block(x) if self.call is None else self.call(x)
        return y.view(x.shape)


def modeling(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def layer(plugins, settings, top_k=2, shared=0, experts=EXPERTS, **spec):
    """A layer of swiglu experts."""
    spec = {"activation": "swiglu", "experts": experts, "top_k": top_k, "shared": shared, **spec}
    torch.manual_seed(3)
    return Engine(plugins, settings, **spec).moe(DIM, HIDDEN)


def filled(kind, config, **more):
    """A block, which transformers leaves uninitialised, with random weights."""
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = kind(config, **more)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def transposed(weight):
    return weight.mT


def joined(*weights):
    return torch.cat(weights)


def tie_shared(pair, mlp):
    """The shared expert's three matrices, of which the layer joins two."""
    pair.tie(pair.layer.shared.enter.weight, mlp.gate_proj.weight, mlp.up_proj.weight, by=joined)
    pair.tie(pair.layer.shared.leave.weight, mlp.down_proj.weight)


def tie_routed(pair):
    """The router, and experts in the usual layout [E, 2H, D] and [E, D, H]."""
    pair.tie(pair.layer.router.weight, pair.block.gate.weight)
    pair.tie(pair.layer.experts.w_in, pair.block.experts.gate_up_proj, by=transposed)
    pair.tie(pair.layer.experts.w_out, pair.block.experts.down_proj, by=transposed)


def selection_bias(pair, buffer):
    with torch.no_grad():
        buffer.copy_(
            torch.tensor(BIAS).view_as(buffer) if buffer.numel() == EXPERTS else torch.randn(buffer.shape) / 20
        )
        pair.layer.biases[0]["loss_free"].b.copy_(buffer.flatten())


# -- the blocks ----------------------------------------------------------------------------------------


def qwen2_moe(settings):
    theirs = modeling("qwen2_moe")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": 2 * HIDDEN}
    config = theirs.Qwen2MoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False)
    pair = Pair(layer("topk", settings, shared=2, shared_gate=True), filled(theirs.Qwen2MoeSparseMoeBlock, config))
    tie_routed(pair)
    tie_shared(pair, pair.block.shared_expert)
    pair.tie(pair.layer.shared.gate.weight, pair.block.shared_expert_gate.weight)
    return pair


def qwen3_next(settings):
    theirs = modeling("qwen3_next")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": HIDDEN}
    config = theirs.Qwen3NextConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=True)
    pair = Pair(layer("topk", settings, shared=1, shared_gate=True), filled(theirs.Qwen3NextSparseMoeBlock, config))
    tie_routed(pair)
    tie_shared(pair, pair.block.shared_expert)
    pair.tie(pair.layer.shared.gate.weight, pair.block.shared_expert_gate.weight)
    return pair


def deepseek_v2(settings, method="greedy", **choice):
    theirs = modeling("deepseek_v2")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
    choice |= {"num_experts_per_tok": 4, "routed_scaling_factor": 2.5, "topk_method": method, "num_attention_heads": 4}
    pair = Pair(layer("topk", settings, top_k=4, shared=1), None)
    pair.block = filled(theirs.DeepseekV2Moe, theirs.DeepseekV2Config(**sizes, **choice))
    tie_routed(pair)
    tie_shared(pair, pair.block.shared_experts)
    return pair


def deepseek_v2_groups(settings):
    return deepseek_v2(settings, "group_limited_greedy", n_group=4, topk_group=2)


def deepseek_v3(settings, top_k=4, kept=2, norm=True):
    theirs = modeling("deepseek_v3")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
    choice = {"num_experts_per_tok": top_k, "n_group": 4, "topk_group": kept, "norm_topk_prob": norm}
    pair = Pair(layer("sigmoid_topk,loss_free", settings, top_k=top_k, shared=1), None)
    pair.block = filled(theirs.DeepseekV3MoE, theirs.DeepseekV3Config(**sizes, **choice, routed_scaling_factor=1.5))
    tie_routed(pair)
    tie_shared(pair, pair.block.shared_experts)
    selection_bias(pair, pair.block.gate.e_score_correction_bias)
    return pair


def deepseek_v3_without_norm(settings):
    return deepseek_v3(settings, norm=False)


def deepseek_v3_of_two(settings):
    return deepseek_v3(settings, top_k=2)


def ernie(settings):
    theirs = modeling("ernie4_5_moe")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "moe_num_experts": EXPERTS}
    config = theirs.Ernie4_5_MoeConfig(**sizes, moe_k=3, moe_num_shared_experts=2, use_bias=False)
    pair = Pair(layer("topk,loss_free", settings, top_k=3, shared=2), filled(theirs.Ernie4_5_MoeSparseMoeBlock, config))
    tie_routed(pair)
    tie_shared(pair, pair.block.shared_experts)
    selection_bias(pair, pair.block.gate.moe_statics.e_score_correction_bias)
    return pair


def longcat(settings):
    """Eight MLPs and four copies; the block has a first matrix, which it never uses, for each copy too."""
    theirs = modeling("longcat_flash")
    sizes = {"hidden_size": DIM, "expert_ffn_hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "zero_expert_num": 4}
    config = theirs.LongcatFlashConfig(**sizes, moe_topk=3, routed_scaling_factor=1.5)
    pair = Pair(layer("topk,zero_computation,loss_free", settings, top_k=3, experts=12), None)
    pair.block = filled(theirs.LongcatFlashMoE, config)
    pair.tie(pair.layer.router.weight, pair.block.router.classifier.weight)
    pair.tie(pair.layer.experts.w_in, pair.block.experts.gate_up_proj, by=transposed)
    down = pair.block.experts.down_proj
    pair.tie(pair.layer.experts.w_out, down, by=lambda weight: F.pad(weight.mT, (0, 0, 0, 0, 0, 4)))
    selection_bias(pair, pair.block.router.e_score_correction_bias)
    return pair


def gpt_oss(settings):
    """Its gate and up projections alternate."""
    theirs = modeling("gpt_oss")
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    config = theirs.GptOssConfig(**sizes, swiglu_limit=1.0)
    pair = Pair(layer("topk,clamped_swiglu", settings, bias=True), filled(theirs.GptOssMLP, config))
    pair.call = lambda x: pair.block(x)[0]
    ours, block = pair.layer, pair.block

    def apart(weight):
        return torch.cat([weight[..., ::2], weight[..., 1::2]], dim=-1)

    pair.tie(ours.router.weight, block.router.weight)
    pair.tie(ours.router.bias, block.router.bias)
    pair.tie(ours.experts.w_in, block.experts.gate_up_proj, by=apart)
    pair.tie(ours.experts.b_in, block.experts.gate_up_proj_bias, by=apart)
    pair.tie(ours.experts.w_out, block.experts.down_proj)
    pair.tie(ours.experts.b_out, block.experts.down_proj_bias)
    return pair


def llama4(settings, top_k=1):
    theirs = modeling("llama4")
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
    config = theirs.Llama4TextConfig(**sizes, num_experts_per_tok=top_k)
    pair = Pair(
        layer("sigmoid_topk,gated_input", settings, top_k=top_k, shared=1), filled(theirs.Llama4TextMoe, config)
    )
    pair.call = lambda x: pair.block(x)[0]
    pair.tie(pair.layer.router.weight, pair.block.router.weight)
    pair.tie(pair.layer.experts.w_in, pair.block.experts.gate_up_proj)
    pair.tie(pair.layer.experts.w_out, pair.block.experts.down_proj)
    tie_shared(pair, pair.block.shared_expert)
    return pair


def llama4_of_two(settings):
    return llama4(settings, top_k=2)


def dbrx(settings):
    theirs = modeling("dbrx")
    ffn = {"hidden_size": DIM, "ffn_hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_top_k": 3}
    config = theirs.DbrxConfig(d_model=DIM, ffn_config={**ffn, "moe_normalize_expert_weights": 2.0})
    pair = Pair(layer("topk", settings, top_k=3), filled(theirs.DbrxFFN, config))
    mlp = pair.block.experts.mlp

    def stacked(weight):
        return weight.view(EXPERTS, HIDDEN, DIM)

    pair.tie(pair.layer.router.weight, pair.block.router.layer.weight)
    pair.tie(pair.layer.experts.w_in, mlp.w1, mlp.v1, by=lambda w, v: torch.cat([stacked(w), stacked(v)], 1).mT)
    pair.tie(pair.layer.experts.w_out, mlp.w2, by=stacked)
    return pair


def deepseek_v4(settings):
    """Without its shared expert, whose SwiGLU is clamped too."""
    theirs = modeling("deepseek_v4")
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "num_hidden_layers": 4}
    choice = {"num_experts_per_tok": 3, "routed_scaling_factor": 1.5, "swiglu_limit": 1.0}
    config = theirs.DeepseekV4Config(**sizes, **choice)
    pair = Pair(layer("sqrtsoftplus_topk,clamped_swiglu,loss_free", settings, top_k=3), None)
    pair.block = filled(theirs.DeepseekV4SparseMoeBlock, config, layer_idx=config.mlp_layer_types.index("moe"))
    pair.block.shared_experts.requires_grad_(False)
    for parameter in pair.block.shared_experts.parameters():
        parameter.data.zero_()
    tie_routed(pair)
    selection_bias(pair, pair.block.gate.e_score_correction_bias)
    return pair


def switch(settings):
    """With room for every token: it drops per sequence, and in evaluation too."""
    theirs = modeling("switch_transformers")
    sizes = {"d_model": DIM, "d_ff": HIDDEN, "num_experts": EXPERTS, "expert_capacity": 99, "router_bias": True}
    config = theirs.SwitchTransformersConfig(**sizes, dropout_rate=0.0, router_jitter_noise=0.0)
    pair = Pair(layer("topk", settings, top_k=1, activation="relu"), filled(theirs.SwitchTransformersSparseMLP, config))
    experts = pair.block.experts.values()

    def stacked(*weights):
        return torch.stack(weights).mT

    pair.tie(pair.layer.router.weight, pair.block.router.classifier.weight)
    pair.tie(pair.layer.router.bias, pair.block.router.classifier.bias)
    pair.tie(pair.layer.experts.w_in, *(expert.wi.weight for expert in experts), by=stacked)
    pair.tie(pair.layer.experts.w_out, *(expert.wo.weight for expert in experts), by=stacked)
    return pair


def no_renorm(router, *others):
    return [f"{router}.{setting}" for setting in ("renorm=false", *others)]


V3 = [f"sigmoid_topk.{setting}" for setting in ("groups=4", "groups_kept=2", "scale=1.5")]
V4 = ["clamped_swiglu.limit=1", "clamped_swiglu.alpha=1", "clamped_swiglu.beta=0", "sqrtsoftplus_topk.scale=1.5"]
COPIES = ["zero_computation.zero=0", "zero_computation.copy=4", "zero_computation.constant=0"]
BLOCKS = {  # settings that are no default, then those of them that the block needs
    qwen2_moe: ([], no_renorm("topk")),
    qwen3_next: ([], []),
    deepseek_v2: ([], no_renorm("topk", "scale=2.5")),
    deepseek_v2_groups: (["topk.groups=4", "topk.groups_kept=2"], no_renorm("topk", "scale=2.5", "group_score=max")),
    deepseek_v3_without_norm: (V3, no_renorm("sigmoid_topk")),
    deepseek_v3_of_two: (V3, ["sigmoid_topk.group_score=top2"]),
    ernie: ([], ["topk.scores=probs"]),
    longcat: (COPIES, no_renorm("topk", "scores=probs", "scale=1.5")),
    switch: (["topk.router_bias=true"], []),
    gpt_oss: (["topk.router_bias=true"], ["clamped_swiglu.limit=1"]),
    llama4: ([], []),
    llama4_of_two: ([], no_renorm("sigmoid_topk")),
    dbrx: ([], ["topk.renorm_p=2"]),
    deepseek_v4: ([], V4),
}
blocks = pytest.mark.parametrize(("build", "settings"), [(b, [*s, *n]) for b, (s, n) in BLOCKS.items()])
needs = [(build, [*fixed, *needed], one) for build, (fixed, needed) in BLOCKS.items() for one in needed]


def inputs():
    return (torch.randn(3, 20, DIM, generator=torch.Generator().manual_seed(1))).requires_grad_()


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@blocks
def test_output_and_all_gradients_are_the_blocks(build, settings):
    """Of a loss that weighs every output differently; no parameter of either is left out."""
    pair, x = build(settings), inputs()
    learned = [parameter for parameter in pair.block.parameters() if parameter.requires_grad]
    assert {id(tensor) for _, _, theirs in pair.ties for tensor in theirs} == {id(parameter) for parameter in learned}
    assert {id(ours) for ours, _, _ in pair.ties} == {id(parameter) for parameter in pair.layer.parameters()}
    y, expected = pair.layer(x), pair.theirs(x)
    assert_close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((y * weights).sum(), [x, *(ours for ours, _, _ in pair.ties)])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *learned])
    by_id = dict(zip(map(id, learned), theirs[1:], strict=True))
    assert_close(found[0], theirs[0])
    for grad, (_, by, tensors) in zip(found[1:], pair.ties, strict=True):
        assert_close(grad, by(*(by_id[id(tensor)] for tensor in tensors)))
        assert grad.any()


@pytest.mark.parametrize(("build", "settings", "needed"), needs)
def test_the_block_needs_each_option(build, settings, needed):
    """Left out, the output differs: the agreement above is none by chance."""
    x = inputs().detach()
    pair = build([setting for setting in settings if setting != needed])
    assert (pair.layer(x) - pair.theirs(x)).abs().max() > 0.01


# -- on numbers small enough to check on paper ----------------------------------------------------------


def gates(plugins, logits, settings=(), bias=None, **spec):
    """The gates [E] of one token with these logits."""
    logits = torch.tensor([logits])
    moe = Engine(plugins, settings, experts=logits.shape[1], **spec).moe(logits.shape[1], 4)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(logits.shape[1]))
        if bias is not None:
            moe.router.bias.copy_(torch.tensor(bias))
    return moe.route(moe.tokens(logits)).gates()[0]


def test_gates_of_order_two_have_length_one_times_the_scale():
    """p = (4, 3, 1) / 8: of the two kept, 4 / 5 and 3 / 5."""
    logits = torch.tensor([4.0, 3.0, 1.0]).log().tolist()
    found = gates("topk", logits, ["topk.renorm_p=2", "topk.scale=10"], top_k=2)
    torch.testing.assert_close(found, torch.tensor([8.0, 6.0, 0.0]))


def test_router_bias_shifts_choice_and_gate():
    """Unlike a selection bias: the softmax of (0 + ln 3, 0, -9)."""
    settings = ["topk.router_bias=yes"]
    found = gates("topk", [0.0, 0.0, 1.0], settings, bias=[torch.tensor(3.0).log(), 0.0, -10.0], top_k=2)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25, 0.0]))


@pytest.mark.parametrize(("score", "chosen"), [("max", 0), ("top2", 3), ("sum", 0)])
@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_the_group_score_decides_which_group_is_kept(router, score, chosen):
    """Group {0, 1, 2} has the best expert, group {3, 4, 5} the best two; at K = groups_kept a sum has one term."""
    settings = [f"{router}.groups=2", f"{router}.groups_kept=1", f"{router}.group_score={score}"]
    found = gates(router, [2.0, -3.0, -4.0, 1.9, 1.8, -4.0], settings, top_k=1)
    assert found.nonzero().flatten().tolist() == [chosen]


def test_sqrt_of_softplus_by_hand():
    """softplus(ln 3) = ln 4 = 2 ln 2 and softplus(0) = ln 2: the scores are as sqrt 2 to 1."""
    found = gates("sqrtsoftplus_topk", [torch.tensor(3.0).log(), 0.0], ["sqrtsoftplus_topk.scale=3"], top_k=2)
    torch.testing.assert_close(found, 3 * torch.tensor([2**0.5, 1]) / (1 + 2**0.5))
    single = gates("sqrtsoftplus_topk", [0.0, -1.0], top_k=1)
    torch.testing.assert_close(single, torch.tensor([torch.tensor(2.0).log().sqrt(), 0.0]))


def test_sqrt_softplus_scores_far_below_zero_still_make_a_distribution():
    """Where softplus itself has long become 0, and its logarithm infinite."""
    torch.testing.assert_close(gates("sqrtsoftplus_topk", [-300.0, -300.0, -300.0], top_k=3), torch.full((3,), 1 / 3))


def test_a_gate_of_shared_experts_starts_from_its_input():
    """At w = 0 it halves the shared output; without shared experts it makes no sense."""
    moe, x = layer("topk", [], shared=2, shared_gate=True), inputs().detach()
    whole = moe.shared.leave(moe.shared.act(moe.shared.enter(x)))
    moe.shared.gate.weight.data.zero_()
    torch.testing.assert_close(moe.shared(x), whole / 2)
    with refused("bad-layer-spec", "shared_gate", "shared"):
        layer("topk", [], shared_gate=True)


def test_a_gate_on_the_input_is_one_on_the_output_for_relu_only():
    """F(g x) = g F(x), which is why it takes another activation, or a bias, to tell the two apart."""
    x = inputs().detach()
    for spec, same in (({"activation": "relu"}, True), ({"activation": "relu", "bias": True}, False), ({}, False)):
        plain, scaled = layer("topk", [], **spec), layer("topk,gated_input", [], **spec)
        scaled.load_state_dict(plain.state_dict())
        assert torch.allclose(scaled(x), plain(x), atol=1e-6) == same


def test_gates_of_dropped_rows_reach_no_gradient():
    """Not even NaN."""
    bank = layer("topk,gated_input", []).experts
    x = inputs().detach()[0].requires_grad_()
    gate = torch.tensor([1.0, 1.0, torch.nan])
    counts = torch.tensor([2] + [0] * (EXPERTS - 1))
    y = bank.combined(x, torch.tensor([0, 1, 2]), gate, counts)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and not x.grad[2].any()


def test_every_kind_of_expert_without_an_mlp_by_its_formula():
    """Experts 0 to 3 are MLPs, then one zero, two copies and a constant; rows of no expert come back as 0."""
    settings = [f"zero_computation.{setting}" for setting in ("zero=1", "copy=2", "constant=1")]
    bank, plain = (
        layer(plugins, s, bias=True).experts for plugins, s in (("topk,zero_computation", settings), ("topk", []))
    )
    names = ("w_in", "w_out", "b_in", "b_out")
    for name in names:
        bank.get_parameter(name).data.copy_(plain.get_parameter(name))
    bank.v.data.normal_()
    x = inputs().detach()[0]
    counts, mlps = torch.tensor([2, 0, 3, 1, 2, 4, 1, 5]), torch.tensor([2, 0, 3, 1, 0, 0, 0, 0])
    y, a = bank(x, counts), (x[13:18] @ bank.w_a[7]).softmax(-1)
    torch.testing.assert_close(y[:6], plain(x, mlps)[:6])
    assert not y[6:8].any()
    assert torch.equal(y[8:13], x[8:13])
    torch.testing.assert_close(y[13:18], a[:, :1] * x[13:18] + a[:, 1:] * bank.v[7])
    assert not y[18:].any()


def test_a_new_expert_is_of_its_parents_kind_and_an_mlp_without_one():
    settings = [f"zero_computation.{setting}" for setting in ("zero=1", "copy=1", "constant=1")]
    engine = Engine("topk,zero_computation,clone", settings, experts=5, top_k=2)
    moe = engine.moe(DIM, HIDDEN, name="m")
    engine.grow(Growth("m", parents=(3, 0, None), drop=(2,)))
    assert moe.experts.kind.tolist() == [0, 0, 2, 2, 3, 0, 0]  # the first new one takes the place of the removed one
    x = inputs().detach()[0]
    assert torch.equal(moe.experts.outputs(x)[2], x)
    assert moe.experts.outputs(x)[6].any()


@pytest.mark.parametrize(
    ("plugins", "settings", "spec", "words"),
    [
        ("topk", ["topk.renorm_p=0.5"], {}, ("renorm_p", ">= 1")),
        ("topk", ["topk.scores=sigmoid"], {}, ("scores", "'logits'", "'probs'")),
        ("topk", ["topk.group_score=mean"], {}, ("group_score", "'top2'")),
        ("sigmoid_topk", ["sigmoid_topk.renorm=true"], {"top_k": 1}, ("sigmoid_topk.renorm", "top_k=1")),
        ("topk,zero_computation", ["zero_computation.copy=7"], {}, ("zero_computation", "no MLP among 8")),
        ("topk,zero_computation,zero_output", [], {}, ("zero_output", "zero_computation")),
        ("topk,clamped_swiglu", ["clamped_swiglu.limit=0"], {}, ("limit", ">= 1e-06")),
        ("topk,clamped_swiglu,gated_input", [], {}, ("clamped_swiglu", "gated_input")),
    ],
)
def test_what_makes_no_sense_is_refused(plugins, settings, spec, words):
    with pytest.raises(UsageError) as caught:
        layer(plugins, settings, **spec)
    assert [word for word in words if word not in str(caught.value)] == []


def test_copies_need_an_output_as_wide_as_the_input():
    with pytest.raises(UsageError, match="zero_computation can't copy 24 numbers to out=9"):
        Engine("topk,zero_computation", experts=EXPERTS).moe(DIM, HIDDEN, out=9)
    settings = ["zero_computation.copy=0", "zero_computation.constant=0"]
    assert Engine("topk,zero_computation", settings).moe(DIM, HIDDEN, out=9)(inputs()).shape == (3, 20, 9)
