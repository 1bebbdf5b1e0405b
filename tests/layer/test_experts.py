"""Banks of experts: stacked, and of any modules."""

import torch
from torch import nn

from moe_engine import Engine, ModuleBank


def reference(layer, x):
    """The same mixture, token by token: sum over the chosen experts of gate times expert."""
    routing = layer.route(layer.tokens(x))
    outputs_ETO = layer.experts.outputs(x.reshape(-1, x.shape[-1]))
    y = torch.einsum("te,eto->to", routing.gates().to(x.dtype), outputs_ETO)
    if layer.shared is not None:
        y = y + layer.shared(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], -1)


def test_experts_without_tokens_get_zero_gradients():
    layer = Engine("topk", experts=4, top_k=1).moe(3, 4)
    layer(torch.ones(1, 3)).sum().backward()
    used = (layer.experts.w_out.grad.abs().sum((1, 2)) > 0).sum()
    assert used == 1
    assert torch.isfinite(layer.experts.w_in.grad).all()


def test_modules_of_any_kind_can_be_experts():
    """Convolutional experts on flattened images agree with calling them one by one."""

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, rows):
            return self.conv(rows.view(-1, 1, 4, 4)).flatten(1)

    layer = Engine("topk", top_k=2).moe(16, modules=[Conv() for _ in range(3)])
    x = torch.randn(5, 16)
    assert isinstance(layer.experts, ModuleBank)
    assert layer.spec.experts == 3
    torch.testing.assert_close(layer(x), reference(layer, x))


def test_only_declared_tensors_are_held_at_fp32():
    """A bank's BatchNorm follows `.to(bf16)`; a bias's state, which its part declares, stays in fp32."""
    engine = Engine("topk,saturation", ["saturation.signal=weights"], top_k=1)
    modules = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Identity(), nn.Linear(4, 4)]
    layer = engine.moe(4, modules=modules).to(torch.bfloat16)
    (layer(torch.randn(9, 4, dtype=torch.bfloat16)).float().square().sum() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()
    assert layer.biases[0]["saturation"].s.dtype == torch.float32
    assert layer.biases[0]["saturation"].s[1] == 0
