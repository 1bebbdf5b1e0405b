import attrs
import torch
from torch import nn

from moe_engine import ACTIVATIONS, Experts, grouped_linear, hookimpl, option, row_counts, uniform, zeros


@attrs.define(eq=False)
class Lora:
    """One shared MLP plus a low-rank change per expert.

    W_e = W + (alpha / rank) A_e B_e for both matrices of act(x W_in + b_in) W_out + b_out; biases, where the layer
    has them, are shared. A is random and B is 0, so every expert, including a freshly drawn one, starts as the
    shared MLP. W_e is never built: x W_e = x W + (alpha / rank) (x A_e) B_e.

    Sources: Hu et al., 2021 (LoRA); Li et al., 2024 (MixLoRA, as experts).
    """

    rank: int = option(8, help="rank of each expert's change", min=1)
    alpha: float = option(16.0, help="strength: the change is scaled by alpha / rank", min=1e-6)
    train_base: bool = option(True, help="train the shared MLP too; false: freeze it")

    @hookimpl
    def moe_check(self, setup):
        if silent := setup.others(self, effect="silent_start"):
            return f"{silent[0]} can't silence new experts of lora, which share an MLP; choose another initializer"
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
        self.base_in = nn.Linear(spec.dim, wide, bias=spec.bias).requires_grad_(train_base)
        self.base_out = nn.Linear(spec.hidden, spec.out_dim, bias=spec.bias).requires_grad_(train_base)
        self.expert_param("a_in", (spec.experts, spec.dim, rank), fresh=uniform(spec.dim), role="in")
        self.expert_param("b_in", (spec.experts, rank, wide), fresh=zeros, role="in")
        self.expert_param("a_out", (spec.experts, spec.hidden, rank), fresh=uniform(spec.hidden), role="output")
        self.expert_param("b_out", (spec.experts, rank, spec.out_dim), fresh=zeros, role="output")

    def forward(self, x_ND, counts_E):
        counts = row_counts(counts_E)
        hidden_NH = self.act(self.base_in(x_ND) + self._change(x_ND, self.a_in, self.b_in, counts))
        out_NO = self.base_out(hidden_NH) + self._change(hidden_NH, self.a_out, self.b_out, counts)
        routed_N = torch.arange(x_ND.shape[0], device=x_ND.device) < counts_E.sum()
        return torch.where(routed_N[:, None], out_NO, 0)  # the shared MLP also computes rows of no expert

    def _change(self, x, a, b, counts):
        return self.scale * grouped_linear(grouped_linear(x, a, None, counts), b, None, counts)
