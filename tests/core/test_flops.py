"""The closed form, held against what torch counts in an eager forward."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import Engine
from moe_engine.experts import DenseMLP, dense_twin
from moe_engine.flops import Flops, layer_flops, mlp_flops, model_flops
from moe_engine.routing import Spec

TOKENS = 24


def counted(module, x):
    """FLOPs a token of one eager forward."""
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() / x.shape[0]


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk", "hierarchical"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_layer_takes_what_torch_counts(router, activation, bias, shared):
    engine = Engine(router, experts=6, top_k=2, activation=activation, bias=bias, shared=shared, out=7)
    layer = engine.moe(5, 11)
    assert counted(layer, torch.randn(TOKENS, 5)) == layer_flops(layer).active


def test_by_hand():
    """D 4, H 3, E 5, K 2, one shared: router 2*5*4; an expert 2*4*3 + 2*3*4; all five for the total."""
    layer = Engine("topk", experts=5, top_k=2, shared=1).moe(4, 3)
    assert Flops(40 + 48 + 2 * 48, 40 + 48 + 5 * 48) == layer_flops(layer)


def test_a_level_of_groups_adds_its_rows():
    """Two groups and six experts of four dimensions: 2*4*(2 + 6) in the router, an expert 2*4*3 + 2*3*4."""
    layer = Engine("hierarchical", experts=6, top_k=2).moe(4, 3)
    expected = 64 + 2 * 48
    assert expected == layer_flops(layer).active


def test_measured_rows_take_the_place_of_k():
    layer = Engine("topk", experts=5, top_k=2).moe(4, 3)
    expected = 40 + 1.25 * 48
    assert expected == layer_flops(layer, rows=1.25).active
    assert layer_flops(layer).total == layer_flops(layer, rows=1.25).total


def test_a_bank_of_modules_is_counted():
    """Two of the experts 4 -> 3 -> 4 beside the router's 2*5*4; counting leaves them as they were."""
    experts = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)) for _ in range(5)]
    layer = Engine("topk", top_k=2).moe(4, modules=experts)
    assert layer_flops(layer) == Flops(40 + 2 * 48, 40 + 5 * 48)
    assert all(module.training for module in layer.modules())
    assert all(expert[1].num_batches_tracked == 0 for expert in experts)


def test_deep_experts_by_hand():
    """2*5*4 + 2*4*3 + 2*3*5 for an expert 5-4-3-5 with norms, which are no products; router 2*6*5."""
    settings = ["deep_mlp.hidden=4,3", "deep_mlp.norm=yes"]
    layer = Engine("topk,deep_mlp", settings, experts=6, top_k=2, bias=True).moe(5, 11)
    assert Flops(60 + 2 * 94, 60 + 6 * 94) == layer_flops(layer)


@pytest.mark.parametrize("bank", ["lora", "conv", "convnet", "deep_mlp"])
def test_other_experts_take_what_torch_counts(bank):
    settings = ["convnet.hidden=4"] if bank == "convnet" else []  # 3 x 3 pixels are pooled once
    layer = Engine(["topk", bank], settings, experts=6, top_k=2, bias=True).moe(9, 11)
    assert counted(layer, torch.randn(TOKENS, 9)) == layer_flops(layer).active


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_the_dense_twin_takes_what_the_active_experts_take(activation):
    spec = Spec(dim=5, hidden=11, out=7, experts=6, top_k=2, shared=1, activation=activation)
    assert 3 * mlp_flops(spec, 11) == counted(dense_twin(spec), torch.randn(TOKENS, 5))


@pytest.mark.parametrize("slots", [1, 3])
def test_mixing_tokens_into_slots_counts(slots):
    """Two sequences of six tokens, five experts: the measured work gives what torch counts."""
    engine = Engine("soft", [f"soft.slots={slots}"], experts=5, out=7)
    layer = engine.moe(4, 3)
    flops = counted(layer, torch.randn(2, 6, 4)) * 2 / 12  # it divides by the first size
    work = engine.metrics("eval")["moe0"]
    assert (5 * slots / 6, 5 * slots) == (work["rows"], work["slots"])
    assert flops == pytest.approx(layer_flops(layer, work["rows"], work["slots"]).active)


@pytest.mark.parametrize("router", ["relu", "threshold", "top_p", "expert_choice"])
def test_a_varying_number_of_choices_is_measured(router):
    engine = Engine(router, experts=6, top_k=2)
    layer = engine.moe(5, 11)
    flops = counted(layer, torch.randn(TOKENS, 5))
    assert flops == pytest.approx(layer_flops(layer, engine.metrics("eval")["moe0"]["rows"]).active)


def test_a_models_flops_are_those_of_its_layers():
    engine = Engine("topk", experts=5, top_k=2)
    model = nn.Sequential(engine.moe(4, 3, name="a"), nn.Linear(4, 4), engine.moe(4, 3, name="b"))
    one = layer_flops(model[0])
    assert one + layer_flops(model[2], 1.5) == model_flops(model, {"b": {"rows": 1.5}})


def test_a_dense_models_flops_are_those_of_its_twins():
    """And not of what the sparse model has too."""
    engine = Engine(experts=5, top_k=2, dense=True)
    model = nn.Sequential(engine.moe(4, 3), DenseMLP(Spec(4, 3)), nn.Linear(4, 4), engine.moe(4, 3))
    assert Flops(2 * 2 * 48, 2 * 2 * 48) == model_flops(model, {})
