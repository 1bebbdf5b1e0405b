"""Memory, next to a real model's: parameters, gradients, Adam's state, and what autograd saves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import Engine
from moe_engine.layer.flops import layer_flops
from moe_engine.plan.memory import memory_of, weights_held
from moe_engine.plan.sizes import Model, Split, Training
from moe_engine.plan.times import expert_flops, step_flops, token_flops

SIZES = {"layers": 2, "dim": 32, "hidden": 24, "experts": 5, "top_k": 2, "sequence": 16, "other": 32 * 11}


class Attention(nn.Module):
    """Norm, projections and flash attention."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, heads=2):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """What a plan takes a model for, with its layers built by an engine."""

    def __init__(self, model):
        super().__init__()
        engine = Engine("topk", experts=model.experts, top_k=model.top_k)
        self.attention = nn.ModuleList(Attention(model.dim) for _ in range(model.layers))
        self.norm = nn.LayerNorm(model.dim, elementwise_affine=False)
        self.moe = nn.ModuleList(
            engine.moe(model.dim, model.hidden, activation=model.activation) for _ in range(model.layers)
        )
        self.head = nn.Linear(model.dim, model.other // model.dim, bias=False)

    def forward(self, x):
        for attention, moe in zip(self.attention, self.moe, strict=True):
            x = x + attention(x)
            x = x + moe(self.norm(x))
        return self.head(x)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_gradients_and_moments_are_a_models(activation, optimizer):
    """Bytes of all parameters, their gradients and the two moments of each."""
    model = Model(**SIZES, activation=activation)
    blocks = Blocks(model)
    made = torch.optim.AdamW(blocks.parameters()) if optimizer == "adamw" else torch.optim.SGD(blocks.parameters())
    blocks(torch.randn(3, 16, 32)).square().sum().backward()
    made.step()
    parameters = list(blocks.parameters())
    states = [made.state[one] for one in parameters if one in made.state]
    moments = [value for state in states for name, value in state.items() if name in ("exp_avg", "exp_avg_sq")]
    found = memory_of(model, Training(optimizer=optimizer), Split(1, 1), 48, 96)
    expected = [sum(one.nbytes for one in some) for some in (parameters, [one.grad for one in parameters], moments)]
    assert [found.weights, found.gradients, found.moments] == expected
    assert found.gathered == 0


def test_the_fullest_rank_has_the_first_chunk_of_the_experts():
    """Of 5 experts on 2 ranks: three; all else is whole, or with sharding one of four parts."""
    model = Model(**SIZES)
    blocks = Blocks(model)
    inside = sum(one.chunk(2)[0].numel() for layer in blocks.moe for one in layer.experts.parameters())
    outside = sum(one.numel() for one in blocks.parameters()) - sum(
        one.numel() for layer in blocks.moe for one in layer.experts.parameters()
    )
    assert weights_held(model, Training(), Split(2, 2)) == outside + inside
    assert weights_held(model, Training(parallel="shard"), Split(2, 2)) == -(-outside // 4) + inside


def test_sharding_gathers_two_layers_and_the_gradients_of_one():
    """A router of 5 * 32 weights and attention of 4 * 32^2; and 5 experts, where they are sharded too."""
    model, training = Model(**SIZES), Training(parallel="shard")
    outside, inside = 5 * 32 + 4 * 32**2, 5 * 2 * 32 * 24
    assert memory_of(model, training, Split(2, 2), 48, 96).gathered == 3 * outside * 4
    assert memory_of(model, training, Split(4, 1), 48, 96).gathered == 3 * (outside + inside) * 4
    assert memory_of(model, Training(), Split(2, 2), 48, 96).gathered == 0


def saved_bytes(blocks, x):
    """Bytes that autograd keeps for backward, each storage once, without weights."""
    weights = {one.untyped_storage().data_ptr() for one in blocks.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = blocks(x)
    return sum(storage.nbytes() for storage in kept.values()), out


def test_activations_are_about_what_autograd_keeps(monkeypatch):
    """Within a quarter, with the experts' plain operations, which a GPU and an exchange use."""
    model = Model(**{**SIZES, "dim": 64, "hidden": 96, "other": 64 * 11}, activation="gelu")
    blocks = Blocks(model)
    for layer in blocks.moe:
        monkeypatch.setattr(layer.experts, "_must_call_forward", lambda: True)
    kept, _ = saved_bytes(blocks, torch.randn(4, 16, 64, requires_grad=True))
    found = memory_of(model, Training(), Split(1, 1), 64, 128).activations
    assert 0.8 < found / kept < 1.25


def test_a_skewed_load_takes_more_memory_where_it_goes():
    """Only the rows that come, of D + W + H each, count more."""
    model = Model(**SIZES)
    even, skewed = (memory_of(model, Training(), Split(1, 2), 48, rows) for rows in (96, 150))
    assert skewed.activations - even.activations == 2 * 54 * (32 + 24 + 24) * 4


def test_flops_are_those_that_torch_counts():
    """Of a forward and backward: all matmuls, with attention scores of the whole square."""
    model = Model(**SIZES)
    blocks = Blocks(model)
    x = torch.randn(3, 16, 32, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for layer in blocks.moe:
            layer.experts._must_call_forward = lambda: True
        blocks(x).square().sum().backward()
    assert counter.get_total_flops() == step_flops(model, 48, 96)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_those_of_the_analysis(activation):
    model = Model(**{**SIZES, "other": 0}, attention=False, activation=activation)
    (layer, _) = Blocks(Model(**SIZES, activation=activation)).moe
    assert token_flops(model) / 2 + 2 * expert_flops(model) == layer_flops(layer).active
