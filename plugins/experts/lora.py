"""One MLP that all experts share, and a low-rank change of it for each."""

import attrs
import torch
from torch import nn

from moe_engine import ACTIVATIONS, Experts, grouped_linear, hookimpl, option, row_counts, uniform, zeros


@attrs.define(eq=False)
class Lora:
    """Expert e has the shared MLP's weights plus a product of two thin matrices: W_e = W + (alpha / rank) A_e B_e.

    For both matrices of act(x W_in + b_in) W_out + b_out; biases, where the layer has them, are shared.
    A is drawn and B is 0, so that all experts, and newcomers drawn anew, begin as the shared MLP.
    W_e is never built: x W + (alpha / rank) (x A_e) B_e.

    Sources: Hu et al., 2021 (LoRA); Li et al., 2024 (MixLoRA, for experts).
    """

    rank: int = option(8, help="width of the change", min=1)
    alpha: float = option(16.0, help="strength: the change counts alpha / rank times", min=1e-6)
    train_base: bool = option(True, help="train the shared MLP too; false: its weights stay as they are")

    @hookimpl
    def moe_check(self, setup):
        if silent := setup.others(self, effect="silent_start"):
            why = "can't start a new expert of lora at 0, because it also has the shared MLP"
            return f"{silent[0]} {why}; choose another initializer"
        return None

    @hookimpl
    def moe_experts(self, spec):
        return LoraExperts(spec, self.rank, self.alpha / self.rank, self.train_base)


class LoraExperts(Experts):
    """a_in [E, D, r], b_in [E, r, H], for swiglu [E, r, 2H]; a_out [E, H, r], b_out [E, r, out]; r the rank."""

    def __init__(self, spec, rank, scale, train_base):
        super().__init__()
        self.act, self.scale = ACTIVATIONS[spec.activation], scale
        wide = 2 * spec.hidden if spec.activation == "swiglu" else spec.hidden
        self.enter = nn.Linear(spec.dim, wide, bias=spec.bias).requires_grad_(train_base)
        self.leave = nn.Linear(spec.hidden, spec.out_dim, bias=spec.bias).requires_grad_(train_base)
        self.expert_param("a_in", (spec.experts, spec.dim, rank), fresh=uniform(spec.dim), role="in")
        self.expert_param("b_in", (spec.experts, rank, wide), fresh=zeros, role="in")
        self.expert_param("a_out", (spec.experts, spec.hidden, rank), fresh=uniform(spec.hidden), role="output")
        self.expert_param("b_out", (spec.experts, rank, spec.out_dim), fresh=zeros, role="output")

    def forward(self, x_ND, counts_E):
        counts = row_counts(counts_E)
        hidden_NH = self.act(self.enter(x_ND) + self._change(x_ND, self.a_in, self.b_in, counts))
        out_NO = self.leave(hidden_NH) + self._change(hidden_NH, self.a_out, self.b_out, counts)
        own_N = torch.arange(x_ND.shape[0], device=x_ND.device) < counts_E.sum()
        return torch.where(own_N[:, None], out_NO, 0)  # the shared MLP answers rows of no expert too

    def _change(self, x, a, b, counts):
        return self.scale * grouped_linear(grouped_linear(x, a, None, counts), b, None, counts)
