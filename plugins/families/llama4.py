import attrs
import torch

from moe_engine import Family, Stored, hookimpl


@attrs.define(eq=False)
class Llama4:
    """Llama 4: sigmoid scores scale the experts' inputs.

    y = sum_i F_i(g_i x), g_i = sigmoid of the K largest logits.

    Source: Meta, 2025 (The Llama 4 herd).
    """

    @hookimpl
    def moe_family(self):
        return Llama4Family(router="router", logits=1, decides="router", tensors=TENSORS, recipe=recipe)


TENSORS = {
    "router.weight": Stored("logit_row", fan_in=1),
    "experts.gate_up_proj": Stored("in", fan_in=1, hidden=2),
    "experts.down_proj": Stored("output", fan_in=1, hidden=1),
}


class Llama4Family(Family):
    """The router returns the gates [T, E], and the experts are given every token E times, scaled."""

    def decision(self, block, given, routed):
        gate_TK, expert_TK = routed.returned[0].topk(block.router.top_k, dim=-1)
        return routed.states.flatten(0, -2), expert_TK, gate_TK

    def states(self, given, routed):
        return routed.states

    def compute(self, block, plain, x_TD, expert_TK, gate_TK):
        experts = block.experts.num_experts
        gate_TE = torch.zeros(len(x_TD), experts, dtype=gate_TK.dtype).to(gate_TK).scatter(1, expert_TK, gate_TK)
        out = plain(x_TD.repeat(experts, 1) * gate_TE.t().reshape(-1, 1).to(x_TD.dtype))
        return out.unflatten(0, (experts, -1)).sum(0)

    def answer(self, block, y_TD, given):
        return torch.cat([y_TD, y_TD.new_zeros(len(given[0]) - len(y_TD), y_TD.shape[1])])  # the block sums over E


def recipe(block):
    return "sigmoid_topk", {"renorm": False}
