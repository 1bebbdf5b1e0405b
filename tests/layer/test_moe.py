"""The layer against a plain reference, in every shape and precision it supports."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_engine import Engine, PluginError
from moe_engine.layer import fused_cpu
from support import refused

ROUTERS = ["topk", "sigmoid_topk", "hierarchical"]


def reference(layer, x):
    """The same mixture, token by token: sum over the chosen experts of gate times expert."""
    routing = layer.route(layer.tokens(x))
    outputs_ETO = layer.experts.outputs(x.reshape(-1, x.shape[-1]))
    y = torch.einsum("te,eto->to", routing.gates().to(x.dtype), outputs_ETO)
    if layer.shared is not None:
        y = y + layer.shared(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_is_the_gated_sum_of_the_chosen_experts(activation, bias):
    layer = (
        Engine("topk", experts=4, top_k=2, activation=activation, bias=bias, shared=1).moe(6, 10, out=5).double().eval()
    )
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_are_those_of_finite_differences(router, top_k):
    settings = ["hierarchical.groups=1"] if router == "hierarchical" else []
    layer = Engine(router, settings, experts=4, top_k=top_k).moe(3, 5).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(x, w_in, gate_weight):
        return torch.func.functional_call(layer, {"experts.w_in": w_in, "router.weight": gate_weight}, (x,))

    inputs = (x, *(weight.detach().clone().requires_grad_() for weight in (layer.experts.w_in, layer.router.weight)))
    assert torch.autograd.gradcheck(run, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("router", ROUTERS)
def test_any_leading_shape_even_without_tokens(router, shape):
    engine = Engine([router, "saturation", "switch_aux"], experts=4, top_k=2)
    layer = engine.moe(6, 8, out=3)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    (y.sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert y.shape == (*shape[:-1], 3)
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert all(torch.isfinite(b).all() for b in layer.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_input_and_routing_is_fp32(dtype):
    layer = Engine("topk,saturation", experts=4).moe(6, 8).to(dtype)
    y = layer(torch.randn(5, 6, dtype=dtype))
    routing = layer.route(layer.tokens(torch.randn(5, 6, dtype=dtype)))
    least = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype
    assert [routing.levels[0].logits.dtype, routing.plan.weight.dtype] == [least, least]
    assert layer.biases[0]["saturation"].s.dtype == torch.promote_types(torch.float32, dtype)


def test_autocast_gives_its_dtype_and_fp32_gates():
    engine = Engine("topk,switch_aux,z_loss", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(5, 6)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = y.float().sum() + engine.aux_loss()
    loss.backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    assert layer.router.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_changes_nothing(router):
    """The content of padding, even NaN, reaches no output, gradient, loss, load or state."""
    names = [router, "saturation", "loss_free", "switch_aux", "z_loss", "gate_variance"]

    def trial(padding, capacity=1.0):
        torch.manual_seed(0)
        engine = Engine(names, experts=4, top_k=2, capacity=capacity)
        layer = engine.moe(6, 8)
        real = torch.randn(1, 5, 6)
        x = torch.cat([padding, real], dim=1) if padding is not None else real
        mask = torch.arange(x.shape[1])[None] >= x.shape[1] - 5
        y = layer(x, mask if padding is not None else None)
        (y[mask].square().sum() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
        sums = layer.sums.take_since_log()
        grads = [p.grad for p in layer.parameters()]
        return y[mask], grads, sums, [b.clone() for b in layer.biases.buffers()], y[~mask]

    plain = trial(None)
    for content in (0.0, 50.0, torch.nan):
        padded = trial(torch.full((1, 3, 6), content))
        torch.testing.assert_close(padded[:4], plain[:4])
        assert padded[4].abs().sum() == 0


def test_a_batch_of_padding_only_counts_as_no_data():
    engine = Engine("topk,saturation,loss_free,switch_aux,z_loss,gate_variance", experts=4)
    layer = engine.moe(6, 8)
    before = {name: b.clone() for name, b in layer.state_dict().items()}
    y = layer(torch.randn(2, 6), torch.zeros(2, dtype=torch.bool))
    (y.sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert y.abs().sum() == 0
    assert engine.metrics() == {}
    assert all(torch.equal(before[name], b) for name, b in layer.state_dict().items())


def test_the_callers_tensor_is_not_changed():
    engine = Engine("sigmoid_topk,saturation,switch_aux", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(3, 6)
    before = x.clone()
    layer(x, torch.tensor([True, False, True]))
    assert torch.equal(before, x)


def test_eval_changes_no_state():
    engine = Engine("topk,saturation,log_load,loss_free,switch_aux", experts=4)
    layer = engine.moe(6, 8).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(50, 6)).sum().backward()
    engine.after_step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("router", ROUTERS)
def test_equal_scores_spread_tokens_over_all_experts(router):
    """With an all-zero router every score ties; tokens must not all go to the same experts."""
    layer = Engine(router, experts=8, top_k=2).moe(6, 8)
    with torch.no_grad():
        for name, parameter in layer.router.named_parameters():
            parameter.zero_()
            assert "weight" in name
    load = layer.route(layer.tokens(torch.randn(4000, 6))).load
    assert load.min() > 800 and load.max() < 1200


@pytest.mark.parametrize("scale", [50.0, -50.0, 1e4])
def test_extreme_logits_stay_finite(scale):
    engine = Engine("topk,saturation,switch_aux,z_loss", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(9, 6) * scale
    (layer(x).sum() + engine.aux_loss()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_wrong_shape_or_mask_is_named():
    layer = Engine("topk", experts=4).moe(6, 8)
    with pytest.raises(ValueError, match=r"layer 'moe0' takes \[..., 6\], not \[2, 5\]"):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"mask is \[3\], the tokens are \[2\]"):
        layer(torch.randn(2, 6), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool, True = a real token"):
        layer(torch.randn(2, 6), torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ({"dim": 6}, "empty-layer", ["dim=6", "hidden=0"]),
        ({"dim": 6, "hidden": 4, "shared": -1}, "bad-layer-spec", ["shared", "whole number", "-1"]),
        ({"dim": 6, "hidden": 4, "experts": "8"}, "bad-layer-spec", ["experts", "whole number", "'8'"]),
        ({"dim": 6, "hidden": 4, "name": "taken"}, "duplicate-layer", ["'taken'"]),
    ],
)
def test_a_layer_that_can_not_be_built_is_refused(spec, code, words):
    engine = Engine("topk")
    taken = engine.moe(6, 4, name="taken") if "name" in spec else None
    with refused(code, *words):
        engine.moe(**spec)
    assert taken is None or taken.name == "taken"


def test_modules_of_the_wrong_width_are_refused():
    with refused("layer-not-built", "layer 'moe0'", "router 'topk'", kind=PluginError):
        Engine("topk").moe(6, modules=[nn.Linear(5, 5), nn.Linear(5, 5)])


def test_labels_outside_the_classes_are_not_counted():
    engine = Engine("topk", experts=4, top_k=1)
    layer = engine.moe(4, 8, classes=3).eval()
    labels = torch.tensor([0, 2, -100, 7, -1])
    layer(torch.randn(5, 4), torch.tensor([True, True, True, True, False]), labels=labels)
    assert engine.metrics("eval")["moe0"]["class_expert"].sum(1).tolist() == [1, 0, 1]


def test_a_forward_without_tokens_does_not_dilute_a_mean():
    engine = Engine("topk,switch_aux", experts=4)
    layer = engine.moe(6, 8)
    x = torch.randn(9, 6)
    for mask in (None, torch.zeros(9, dtype=torch.bool)):
        (layer(x, mask).sum() + engine.aux_loss()).backward()
        engine.after_backward()
    engine.after_step()
    routing = layer.route(layer.tokens(x))
    expected = layer.aux_terms(routing)["switch_aux"].item()
    assert engine.metrics()["moe0"]["loss.switch_aux"] == pytest.approx(expected, rel=1e-5)


def test_converting_a_layer_keeps_what_it_has_counted():
    engine = Engine("topk", experts=4)
    layer = engine.moe(6, 8).eval()
    layer(torch.randn(301, 6))
    layer.to(torch.bfloat16)
    assert layer.sums.take_evaluated()["tokens"] == 301


def test_a_router_may_read_token_ids_which_are_0_at_padding():
    layer = Engine("topk", experts=4).moe(6, 8, vocab=100)
    ids, mask = torch.tensor([[5, 99, 7]]), torch.tensor([[True, False, True]])
    assert layer.tokens(torch.randn(1, 3, 6), mask, ids).ids.tolist() == [5, 0, 7]
    assert layer(torch.randn(1, 3, 6), mask, ids).shape == (1, 3, 6)


@pytest.mark.parametrize("ids", [[5, 100], [-1, 5]])
def test_a_token_id_that_is_none_of_the_vocabulary_is_refused(ids):
    layer = Engine("hash", experts=4).moe(6, 8, vocab=100, name="moe")
    with pytest.raises(ValueError, match=rf"layer 'moe': token ids must be 0 to 99, not {min(ids)} to {max(ids)}"):
        layer(torch.randn(2, 6), ids=torch.tensor(ids))
    layer(torch.randn(2, 6), torch.tensor([ids[0] == 5, ids[1] == 5]), torch.tensor(ids))  # padding may have any


@pytest.mark.parametrize(
    ("precision", "multiplied_in", "limit"),
    [
        ("fp32", torch.float32, 2e-6),
        pytest.param("bf16", torch.bfloat16, 1e-2, marks=pytest.mark.long),
        pytest.param("bf16", torch.float32, 1e-2, marks=pytest.mark.long),
        pytest.param("autocast", torch.bfloat16, 1e-2, marks=pytest.mark.long),
        # eager does not round its factors; some units are near ReLU's kink
        pytest.param("autocast", torch.float32, 5e-2, marks=pytest.mark.long),
    ],
)
def test_compiles_whole_and_no_more_than_twice(precision, multiplied_in, limit, monkeypatch):
    monkeypatch.setitem(fused_cpu.MATMUL_DTYPES, torch.bfloat16, multiplied_in)
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    engine = Engine("saturation,switch_aux", experts=8, top_k=2)
    layer = engine.moe(16, 32)
    if precision == "bf16":
        layer = layer.bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in (8, 12, 20, 33, 64):
        x, found = torch.randn(size, 16).to(layer.experts.w_in.dtype), []
        for run in (compiled, layer):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                y = run(x)
            (y.float().square().mean() + engine.aux_loss()).backward()
            engine.after_backward()
            found.append([y.detach(), *(p.grad for p in layer.parameters())])
        engine.after_step()
        for compiled_value, eager_value in zip(*found, strict=True):
            assert (compiled_value - eager_value).double().norm() < limit * eager_value.double().norm()
    assert counter.frame_count == 2
