"""The closed form, held against what torch counts in an eager forward."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_engine import Engine
from moe_engine.contract.routing import Spec
from moe_engine.layer.dense import DenseMLP, dense_twin
from moe_engine.layer.flops import (
    Flops,
    Parameters,
    forward_flops,
    layer_flops,
    mlp_flops,
    model_flops,
    parameters_of,
)
from moe_engine.tasks.image_models import image_model

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


def test_what_capacity_drops_is_no_work():
    """Equal tokens all choose one of two experts, which keeps ceil(0.5 * 8 / 2) of them."""
    engine = Engine("topk", experts=2, top_k=1, capacity=0.5)
    layer = engine.moe(4, 3)
    torch.nn.init.constant_(layer.router.weight[1], 1.0)
    torch.nn.init.zeros_(layer.router.weight[0])
    layer(torch.ones(8, 4)).sum().backward()
    engine.after_step()
    assert engine.metrics("train")["moe0"]["rows"] == 2 / 8


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


# -- whole models ------------------------------------------------------------------------------------

CLASSES, DIM, HIDDEN, EXPERTS, TOP_K = 7, 12, 5, 6, 2


def build(name, shape, plugins="topk", settings=(), **spec):
    engine = Engine(plugins, settings, **{"experts": EXPERTS, "top_k": TOP_K, **spec})
    return image_model(name, engine, torch.zeros(shape), CLASSES, DIM, HIDDEN, 255.0)


def of(model, shape, samples=1):
    images = torch.randint(256, (samples, *shape))
    return forward_flops(model, lambda: model(images), samples)


def layer_by_hand(dim, out, chosen):
    """2 E D of the router and 2 D H + 2 H out of each expert."""
    return 2 * EXPERTS * dim + chosen * 2 * HIDDEN * (dim + out)


ENDS = 2 * 192 * DIM + 2 * DIM * CLASSES  # of the linear maps before and behind a layer, for 3 x 8 x 8 pixels
CONVOLUTIONS = 2 * (27 * 32 * 64 + 9 * 32 * 64 * 16) + 2 * 64 * 4 * DIM
BY_HAND = {
    "residual": (ENDS, DIM, DIM),
    "plain": (ENDS, DIM, DIM),
    "direct": (0, 192, CLASSES),
    "cnn": (CONVOLUTIONS, DIM, CLASSES),
}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_model_of_pictures_by_hand(name, samples):
    rest, dim, out = BY_HAND[name]
    active, total = (rest + layer_by_hand(dim, out, chosen) for chosen in (TOP_K, EXPERTS))
    model = build(name, (3, 8, 8))
    assert Flops(active, total) == of(model, (3, 8, 8), samples)
    assert model.training
    dense = build(name, (3, 8, 8), plugins="", dense=True)
    expected = rest + TOP_K * 2 * HIDDEN * (dim + out)
    assert Flops(expected, expected) == of(dense, (3, 8, 8), samples)


def densenet_by_hand(first, growth, blocks):
    """Products of its convolutions for 3 x 32 x 32 pixels: 2 * channels * window * filters at each place."""
    flops, channels, side = 2 * 27 * first * 32**2, first, 16
    for number, layers in enumerate(blocks):
        for _ in range(layers):
            flops += 2 * side**2 * (channels * 4 * growth + 9 * 4 * growth * growth)
            channels += growth
        if number < len(blocks) - 1:
            flops += 2 * side**2 * channels * (channels // 2)
            channels, side = channels // 2, side // 2
    return flops, channels


@pytest.mark.parametrize(
    ("name", "growth", "blocks"), [("densenet121", 32, (6, 12, 24, 16)), ("densenet_slim", 12, (3, 6, 12, 8))]
)
def test_a_densenet_by_hand(name, growth, blocks):
    features, channels = densenet_by_hand(64, growth, blocks)
    active, total = (features + 2 * channels * DIM + layer_by_hand(DIM, CLASSES, chosen) for chosen in (TOP_K, EXPERTS))
    assert Flops(active, total) == of(build(name, (3, 32, 32)), (3, 32, 32))
    published = features + 2 * channels * CLASSES
    assert Flops(published, published) == of(build(name, (3, 32, 32), plugins="", dense=True), (3, 32, 32))


def test_flops_follow_k_and_not_e():
    """Of six experts or of twelve a sample goes to two: only the router's rows are more."""
    few, many = (of(build("direct", (3, 8, 8), experts=count), (3, 8, 8)) for count in (6, 12))
    assert many.active - few.active == 2 * 6 * 192
    assert many.total - few.total == 2 * 6 * 192 + 6 * 2 * HIDDEN * (192 + CLASSES)


@pytest.mark.parametrize("plugins", ["topk,deep_mlp", "topk,convnet", "topk,lora", "hierarchical", "top_p"])
def test_a_layer_alone_takes_its_closed_form(plugins):
    settings = ["convnet.channels=3"] if "convnet" in plugins else []
    engine = Engine(plugins, settings, experts=EXPERTS, top_k=TOP_K)
    model = image_model("direct", engine, torch.zeros(3, 8, 8), CLASSES, DIM, HIDDEN, 255.0)
    images = torch.randint(256, (5, 3, 8, 8))
    found = forward_flops(model, lambda: model(images), 5)
    assert engine.metrics("eval") == {}  # that forward is counted nowhere
    model.eval()(images)
    work = {name: value for name, value in engine.metrics("eval")["moe0"].items() if name in ("rows", "slots")}
    expected = layer_flops(model.moe, **work)
    assert (found.active, found.total) == pytest.approx((expected.active, expected.total))


def test_slots_are_counted():
    """Two sequences of six tokens, five experts of three slots: rows that idle are those of slots."""
    engine = Engine("soft", ["soft.slots=3"], experts=5, out=7)
    layer = engine.moe(4, 3)
    found = forward_flops(layer, lambda: layer(torch.randn(2, 6, 4)), 12)
    expected = layer_flops(layer, rows=5 * 3 / 6, slots=5 * 3)
    assert (found.active, found.total) == pytest.approx((expected.active, expected.total))


def test_a_compiled_model_is_counted_too():
    """Its grouped products are custom operators, of which torch counts nothing."""
    model = build("direct", (3, 8, 8))
    expected = of(model, (3, 8, 8))
    model.moe.compile(backend="aot_eager")
    assert expected == of(model, (3, 8, 8))


def test_parameters_of_the_experts_that_act():
    """784-128-64-10 for each of four experts, two of which act, and the router's 4 rows of 784."""
    engine = Engine("topk,deep_mlp", experts=4, top_k=2)
    model = image_model("direct", engine, torch.zeros(28, 28), 10, 1, 1, 255.0)
    assert Parameters(2 * 109_386 + 4 * 784, 4 * 109_386 + 4 * 784) == parameters_of(model)


def test_parameters_of_modules_and_of_what_experts_share():
    """Two of three linear maps 4 -> 4 with biases and the router; lora's two matrices of 4 x 3 act on all tokens."""
    bank = Engine("topk", top_k=2).moe(4, modules=[nn.Linear(4, 4) for _ in range(3)])
    assert Parameters(2 * 20 + 12, 3 * 20 + 12) == parameters_of(bank)
    lora = Engine("topk,lora", ["lora.rank=2"], experts=5, top_k=1).moe(4, 3)
    own = 4 * 2 + 2 * 3 + 3 * 2 + 2 * 4
    assert Parameters(24 + 20 + own, 24 + 20 + 5 * own) == parameters_of(lora)
