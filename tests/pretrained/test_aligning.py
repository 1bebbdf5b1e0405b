"""Experts of adopted models whose hidden units are brought into one order before they are merged."""

import attrs
import pytest
import torch

from moe_engine import Engine, adopt, merging
from moe_engine.pretrained.families import blocks_of, families, family_plugin
from moe_engine.registry.discovery import find, pick
from moe_engine.testing import tiny_model
from support import refused

from .tiny import batch

pytest.importorskip("transformers")

# -- each layout by hand, in the plain model: the hidden units of expert e in another order ------------------


def halves(index_H):
    """Of a dimension with the gates first, then the up projection."""
    return torch.cat([index_H, index_H + len(index_H)])


def stacked(experts, e, index_H):
    """gate_up_proj [E, 2H, D], down_proj [E, D, H]."""
    experts.gate_up_proj[e] = experts.gate_up_proj[e][halves(index_H)]
    experts.down_proj[e] = experts.down_proj[e][:, index_H]


def gpt_oss(experts, e, index_H):
    """gate_up_proj [E, D, 2H], gates at the even places, with biases."""
    wide = torch.stack([2 * index_H, 2 * index_H + 1], 1).flatten()
    experts.gate_up_proj[e] = experts.gate_up_proj[e][:, wide]
    experts.gate_up_proj_bias[e] = experts.gate_up_proj_bias[e][wide]
    experts.down_proj[e] = experts.down_proj[e][index_H]


def dbrx(experts, e, index_H):
    """w1, v1, w2 [E H, D], rows of hidden units."""
    hidden = len(index_H)
    for weight in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2):
        rows = weight[e * hidden : (e + 1) * hidden]
        rows.copy_(rows[index_H].clone())


def llama4(experts, e, index_H):
    """gate_up_proj [E, D, 2H], down_proj [E, H, D]."""
    experts.gate_up_proj[e] = experts.gate_up_proj[e][:, halves(index_H)]
    experts.down_proj[e] = experts.down_proj[e][index_H]


def jetmoe(block, e, index_H):
    """input_linear [E, 2H, D], output_linear [E, D, H]."""
    block.input_linear.weight[e] = block.input_linear.weight[e][halves(index_H)]
    block.output_linear.weight[e] = block.output_linear.weight[e][:, index_H]


LAYOUTS = dict.fromkeys(("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "phimoe"), stacked)
LAYOUTS |= {"gpt_oss": gpt_oss, "dbrx": dbrx, "llama4_text": llama4, "jetmoe": jetmoe}
FIRST, TWIN = 1, 4


def build(kind):
    more = {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0} if kind == "dbrx" else {}
    model = tiny_model(kind, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model):
    ids, mask = batch()
    return model(ids, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def reorder(model, kind, expert):
    """An expert of each block gets its units in another order."""
    for number, block in enumerate(blocks_of(model)):
        path, at = block.family.first("output")
        hidden = block.tensor(path).shape[0] // 8 if at.flat else block.tensor(path).shape[at.fan_in]
        index_H = torch.randperm(hidden, generator=torch.Generator().manual_seed(number))
        LAYOUTS[kind](block.module if kind == "jetmoe" else block.experts, expert, index_H)


@torch.no_grad()
def copy_expert(model, source, target):
    for block in blocks_of(model):
        for path, stored in block.family.tensors.items():
            if stored.role in ("in", "output"):
                tensor = block.tensor(path)
                rows = tensor.unflatten(0, (8, -1)) if stored.flat else tensor
                rows.select(stored.axis, target).copy_(rows.select(stored.axis, source).clone())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_order_of_hidden_units_changes_no_logit(kind):
    """So the layouts above are right."""
    model = build(kind)
    plain = logits(model)
    reorder(model, kind, FIRST)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "llama4_text"])  # its gates are of the inputs
def test_every_expert_answers_for_every_token(kind):
    """With the gates, the sum of the answers is what the block computes."""
    engine, model = Engine("balance"), build(kind)
    adopt(engine, model)
    layer, x = engine.layers[0], torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y_ESD = layer.experts.outputs(x)
        assert y_ESD.shape == (8, 5, 32)
        tokens = layer.tokens(x)
        routing = layer.route(tokens)
        expected = torch.einsum("te,etd->td", routing.gates(), y_ESD)
        torch.testing.assert_close(layer.experts.routed(x, routing.plan, 8), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_expert_and_its_reordered_twin_merge_into_it(kind):
    """Bit for bit in every tensor and output; without align into something else."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for align in (True, False):
        model = build(kind)
        copy_expert(model, FIRST, TWIN)
        reorder(model, kind, TWIN)
        engine = Engine("balance")
        adopt(engine, model)
        for layer in engine.layers:
            bank = layer.experts
            held = {name: getattr(bank, name).detach().select(at.axis, FIRST).clone() for name, at in bank.axes.items()}
            with torch.no_grad():
                y = bank.outputs(x)[FIRST]
            growth = merging(layer, (FIRST, TWIN), align=align)
            assert growth.orders.keys() == (
                {f"experts.{name}" for name in bank.axes if name != "experts_down_proj_bias"} if align else set()
            )
            engine.grow(growth)
            same = [torch.equal(getattr(bank, name).select(bank.axes[name].axis, FIRST), held[name]) for name in held]
            with torch.no_grad():
                moved = float((bank.outputs(x)[FIRST] - y).abs().max() / y.abs().max())
            assert all(same) is align
            assert moved <= 1e-6 if align else moved > 0.05


def test_every_built_in_family_says_where_hidden_units_are():
    """Of all its experts' tensors but the biases of their outputs."""
    for name in families():
        family = family_plugin(pick(name, find()), torch.nn.Identity())
        silent = [path for path, at in family.tensors.items() if at.role in ("in", "output") and at.hidden is None]
        assert silent == (["experts.down_proj_bias"] if name == "gpt_oss" else []), name


def test_moments_are_brought_into_the_same_order():
    """Interleaved gates, with biases."""
    model = build("gpt_oss")
    copy_expert(model, FIRST, TWIN)
    engine = Engine("balance")
    adopt(engine, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    bank, names = engine.layers[0].experts, ("gate_up_proj", "gate_up_proj_bias", "down_proj")
    held = [getattr(bank, f"experts_{name}") for name in names]
    moments = [torch.rand_like(parameter) for parameter in held]
    for parameter, moment in zip(held, moments, strict=True):
        optimizer.state[parameter] = {"step": torch.ones(()), "exp_avg": moment, "exp_avg_sq": moment.clone()}
        moment[TWIN] = moment[FIRST]
    index_H = torch.randperm(held[2].shape[1], generator=torch.Generator().manual_seed(0))
    for experts in (bank.block.experts, attrs.make_class("Moments", names)(*moments)):
        with torch.no_grad():
            gpt_oss(experts, TWIN, index_H)
    firsts = [moment[FIRST].clone() for moment in moments]
    engine.grow(merging(engine.layers[0], (FIRST, TWIN), align=True), optimizer)
    for parameter, first in zip(held, firsts, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"][FIRST], first)


@pytest.mark.parametrize("left_out", [("experts.gate_up_proj", "experts.down_proj"), ("experts.gate_up_proj",)])
def test_a_family_that_does_not_say_where_hidden_units_are_is_refused(left_out):
    """All of them, or only those that lead inward."""
    engine, model = Engine("balance"), build("mixtral")
    adopt(engine, model)
    layer = engine.layers[0]
    family = layer.experts.block.family
    family.tensors = {
        path: attrs.evolve(stored, hidden=None) if path in left_out else stored
        for path, stored in family.tensors.items()
    }
    with refused("cannot-align", "BorrowedExperts", layer.name, "hidden units"):
        merging(layer, (0, 1), align=True)
