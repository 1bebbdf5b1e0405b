"""The fused kernel against float64 and against the reference path."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from moe_engine import Engine, Experts, Growth, StackedMLP, adam
from moe_engine.contract.routing import Assignments, Routing, Spec, Tokens
from moe_engine.layer import fused_cpu
from moe_engine.layer.dispatch import dispatch

TOKENS, DIM, HIDDEN, OUT, EXPERTS = 23, 6, 8, 4, 5
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=[1024, 3], ids=["one block", "blocks of 3 rows"])
def rows(request, monkeypatch):
    monkeypatch.setattr(fused_cpu, "ROWS", request.param)


def rig(activation="relu", bias=False, dtype=torch.float32, seed=0):
    """A bank, tokens, and a plan that leaves expert 2 idle, drops one choice and has one gate of 0."""
    torch.manual_seed(seed)
    bank = StackedMLP(Spec(DIM, HIDDEN, OUT, EXPERTS, 2, activation, bias)).to(dtype)
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype)
    x = torch.randn(TOKENS, DIM).to(dtype).requires_grad_()
    expert = torch.tensor([0, 1, 3, 4])[torch.rand(TOKENS, 4).argsort(-1)[:, :2]].flatten()
    gate = (torch.rand(2 * TOKENS) + 0.1).to(torch.promote_types(dtype, torch.float32))
    gate[5] = 0
    selected = torch.ones(2 * TOKENS, dtype=torch.bool)
    kept = selected.clone()
    kept[7] = False
    index = torch.arange(2 * TOKENS)

    def forward(x, gate):
        plan = Assignments(index // 2, expert, gate, index % 2, selected, kept)
        tokens = Tokens(x, (TOKENS,))
        return dispatch(bank, Routing(tokens, (), None, plan, EXPERTS, 2), OUT)

    return bank, x, gate.requires_grad_(), forward


def output_and_gradients(bank, x, gate, forward):
    """The output and all of its gradients, by name."""
    y = forward(x, gate)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
    inputs = {"x": x, "gate": gate, **dict(bank.named_parameters())}
    grads = torch.autograd.grad(y, list(inputs.values()), weight)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def exact(activation, bias, dtype):
    """The same from the reference path, in float64 on the same values."""
    bank, x, gate, _ = rig(activation, bias, dtype)
    wide, _, _, forward = rig(activation, bias, torch.float64)
    wide.load_state_dict(bank.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedMLP, "combined", Experts.combined)
        x, gate = (values.detach().double().requires_grad_() for values in (x, gate))
        return output_and_gradients(wide, x, gate, forward)


def error(found, wanted):
    """The norm of the difference, relative to the wanted one."""
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_agrees_with_float64(activation, bias, dtype):
    found = output_and_gradients(*rig(activation, bias, dtype))
    wanted = exact(activation, bias, dtype)
    for name, value in found.items():
        limit = LIMITS[dtype] * (2 if dtype == torch.bfloat16 else 1)  # rounding does not average out
        assert error(value, wanted[name]) < limit, name
    assert not found["w_in"][2].any()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("multiplied_in", [torch.float32, torch.bfloat16])
def test_bf16_multiplied_in_either_dtype(multiplied_in, monkeypatch):
    monkeypatch.setitem(fused_cpu.MATMUL_DTYPES, torch.bfloat16, multiplied_in)
    found, wanted = output_and_gradients(*rig("gelu", True, torch.bfloat16)), exact("gelu", True, torch.bfloat16)
    assert max(error(value, wanted[name]) for name, value in found.items()) < 8e-3
    assert found["w_in"].dtype == torch.bfloat16 and found["y"].dtype == torch.float32


@pytest.mark.parametrize("multiplied_in", [torch.float32, torch.bfloat16])
def test_autocast(multiplied_in, monkeypatch):
    monkeypatch.setitem(fused_cpu.MATMUL_DTYPES, torch.bfloat16, multiplied_in)
    bank, x, gate, forward = rig("gelu", True)
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(bank, x, gate, forward)
    wanted = exact("gelu", True, torch.float32)
    worst = max(error(value, wanted[name]) for name, value in found.items())
    assert 1e-4 < worst < 1e-2  # the hidden rows are saved in bf16
    assert found["w_in"].dtype == torch.float32


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(("activation", "bias"), [("gelu", False), ("swiglu", True)])
def test_gradcheck(activation, bias):
    bank, x, gate, forward = rig(activation, bias, torch.float64)

    def forward_with(x, gate, *weights):
        for name, weight in zip(dict(bank.named_parameters()), weights, strict=True):
            bank._parameters[name] = weight
        return forward(x, gate)

    inputs = (x[:].detach().requires_grad_(), gate, *bank.parameters())
    assert gradcheck(forward_with, inputs, fast_mode=True)
    assert gradgradcheck(forward_with, inputs, fast_mode=True)


def test_an_input_that_needs_no_gradient_gets_none():
    bank, x, gate, forward = rig(bias=True)
    wanted = output_and_gradients(bank, x, gate, forward)
    bank.w_in.requires_grad_(False)
    forward(x.detach(), gate).sum().backward()
    assert bank.w_in.grad is None and bank.w_out.grad is not None and bank.b_in.grad is not None
    with torch.no_grad():
        assert torch.equal(forward(x, gate), wanted["y"])


def test_blocks_hold_every_row_once(monkeypatch):
    monkeypatch.setattr(fused_cpu, "ROWS", 4)
    for counts in product(range(7), repeat=3):
        found = fused_cpu.blocks(counts)
        assert all(block.rows.stop - block.rows.start == sum(block.sizes) <= 4 for block in found)
        assert [row for block in found for row in range(block.rows.start, block.rows.stop)] == list(range(sum(counts)))
        pieces = [(e, size, first) for block in found for e, size, first in zip(*block[1:], strict=True)]
        assert [sum(size for e, size, _ in pieces if e == expert) for expert in range(3)] == list(counts)
        assert sum(first for *_, first in pieces) == sum(count > 0 for count in counts)


def test_fp16_is_multiplied_in_fp32():
    assert fused_cpu.matmul_dtype(torch.float16) == torch.float32
    assert fused_cpu.matmul_dtype(torch.float64) == torch.float64
    assert fused_cpu.matmul_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("combined", [StackedMLP.combined, Experts.combined])
def test_a_dropped_choice_adds_nothing_whatever_its_gate(combined, monkeypatch):
    monkeypatch.setattr(StackedMLP, "combined", combined)
    bank, x, gate, forward = rig()
    wanted = output_and_gradients(bank, x, gate, forward)
    broken = gate.detach().clone()
    broken[7] = torch.nan
    found = output_and_gradients(bank, x, broken.requires_grad_(), forward)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("multiplied_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen_by", [[], [2], [0, 2, 2, 3]])
def test_a_token_without_a_choice_gets_nothing(chosen_by, multiplied_in, monkeypatch):
    """All choices of some tokens were dropped, or of all tokens; one that chose twice gets the sum."""
    monkeypatch.setitem(fused_cpu.MATMUL_DTYPES, torch.bfloat16, multiplied_in)
    bank = StackedMLP(Spec(DIM, HIDDEN, OUT, 2, 1)).to(torch.bfloat16)
    x = torch.randn(4, DIM).to(torch.bfloat16).requires_grad_()
    token_N, counts_E = torch.tensor(chosen_by, dtype=torch.long), torch.tensor([len(chosen_by), 0])
    y = bank.combined(x, token_N, torch.ones(len(chosen_by)), counts_E)
    y.sum().backward()
    for token in range(4):
        alone = bank.outputs(x[token : token + 1])[0, 0].detach().float() * chosen_by.count(token)
        assert error(y.detach()[token], alone) < 2e-2 if token in chosen_by else not y[token].any()
        assert bool(x.grad[token].any()) == (token in chosen_by)


def test_an_overridden_forward_is_called():
    class Doubled(StackedMLP):
        def forward(self, x_ND, counts_E):
            return 2 * super().forward(x_ND, counts_E)

    bank, x, gate, forward = rig()
    once = forward(x, gate)
    bank.__class__ = Doubled
    torch.testing.assert_close(forward(x, gate), 2 * once)


def test_hooks_on_the_bank_are_called():
    bank, x, gate, forward = rig()
    calls = []
    with bank.register_forward_hook(lambda *_: calls.append("hook")):
        forward(x, gate)
    forward(x, gate)
    assert calls == ["hook"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gate_that_depends_on_x_counts_once(create_graph, autocast, monkeypatch):
    """Also if the gradient has a graph: the path from x through the router is not the experts'."""

    def gradients(combined):
        monkeypatch.setattr(StackedMLP, "combined", combined)
        torch.manual_seed(0)
        layer = Engine("topk", experts=4, top_k=2).moe(6, 8).eval()
        x = torch.randn(10, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x.bfloat16() if autocast else x).float().square().sum()
        first = torch.autograd.grad(y, (x, *layer.parameters()), create_graph=create_graph)
        penalty = sum(grad.square().sum() for grad in first)
        return [*first, *(torch.autograd.grad(penalty, (x, *layer.parameters())) if create_graph else ())]

    fused, reference = gradients(StackedMLP.combined), gradients(Experts.combined)
    for found, wanted in zip(fused, reference, strict=True):
        assert (found - wanted).norm() <= (2e-2 if autocast else 1e-5) * wanted.norm()


def test_growth_before_backward_leaves_the_gradient_of_the_old_weights():
    def gradient(replace):
        torch.manual_seed(0)
        engine = Engine("topk,random", experts=4, top_k=2)
        layer = engine.moe(6, 8, name="moe").eval()
        x = torch.randn(10, 6, requires_grad=True)
        loss = layer(x).square().sum()
        if replace:
            engine.grow(Growth("moe", (1,), drop=(0,)), optimizers=adam(layer, 1e-2))
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(gradient(replace=False), gradient(replace=True))


def test_matmuls_are_timed_without_autocast(monkeypatch):
    autocast_on = []
    monkeypatch.setattr(torch, "mm", lambda a, b: autocast_on.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        fused_cpu._matmul_seconds(torch.float32)
    assert autocast_on == [False] * 5


def test_matmul_in_sets_the_dtype_of_bf16_only_inside():
    before = fused_cpu.matmul_dtype(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        with fused_cpu.matmul_in(dtype):
            assert fused_cpu.matmul_dtype(torch.bfloat16) == dtype
    assert fused_cpu.matmul_dtype(torch.bfloat16) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gates_near_zero_have_a_gradient(dtype):
    bank, x, gate, forward = rig()
    small = gate.detach().clone()
    small[:4] = torch.tensor([0.0, 1e-30, -1e-30, 1e-40])
    found = output_and_gradients(bank, x, small.to(dtype).requires_grad_(), forward)["gate"]
    wanted = output_and_gradients(bank, x, gate, forward)["gate"]  # y is linear in the gates
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-3)
