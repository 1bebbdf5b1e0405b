import attrs
import torch

from moe_engine import StackedMLP, at_least_fp32, hookimpl


@attrs.define(eq=False)
class GatedInput:
    """Stacked MLPs whose input is scaled by the gate (Llama 4).

    y = sum_i F_i(g_i x) instead of sum_i g_i F_i(x), over a token's experts i. For ReLU without biases both are the
    same. Llama 4 routes by sigmoid_topk at K = 1, with one shared expert, whose input is not scaled.

    Source: Meta, 2025 (The Llama 4 herd).
    """

    @hookimpl
    def moe_experts(self, spec):
        return GatedInputExperts(spec)


class GatedInputExperts(StackedMLP):
    def combined(self, x_TD, token_N, weight_N, counts_E):
        entered_N = torch.arange(token_N.shape[0], device=token_N.device) < counts_E.sum()
        gate_N = torch.where(entered_N, weight_N, 0)  # beyond the counts' sum even a NaN must reach no gradient
        out_NO = self((gate_N[:, None] * x_TD.index_select(0, token_N)).to(x_TD.dtype), counts_E)
        y_TO = torch.zeros(x_TD.shape[0], out_NO.shape[1], dtype=gate_N.dtype, device=x_TD.device)
        return y_TO.index_add(0, token_N, at_least_fp32(out_NO).to(gate_N.dtype))
