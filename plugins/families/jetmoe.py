import attrs
import torch

from moe_engine import Family, Stored, hookimpl


@attrs.define(eq=False)
class JetMoe:
    """JetMoE: a softmax over the top-k logits.

    Its mixture of attention heads is left alone. The config has one number of experts for both mixtures, so a grown
    one can't be exported.

    Source: Shen et al., 2024 (JetMoE).
    """

    @hookimpl
    def moe_family(self):
        return JetMoeFamily(
            router="router",
            experts="input_linear",
            entry="",
            logits=4,
            decides="router",
            count=(),
            tensors=TENSORS,
            recipe=recipe,
        )


TENSORS = {
    "router.layer.weight": Stored("logit_row", fan_in=1),
    "input_linear.weight": Stored("in", fan_in=2, hidden=1),
    "output_linear.weight": Stored("output", fan_in=2, hidden=2),
}


class JetMoeFamily(Family):
    """The router sorts the tokens by expert, and the block computes."""

    def blocks(self, model):
        return (block for block in super().blocks(model) if hasattr(block.module, "activation"))

    def decision(self, block, given, routed):
        order, _, gate, sizes, _ = routed.returned
        expert = torch.arange(len(sizes), device=order.device).repeat_interleave(torch.tensor(sizes).to(order.device))
        shape = (-1, block.router.top_k)
        undone = order.argsort()
        return routed.states.flatten(0, -2), expert[undone].view(shape), gate[undone].view(shape)

    def compute(self, block, plain, x_TD, expert_TK, gate_TK):
        order = expert_TK.flatten().argsort(stable=True)
        sizes = expert_TK.flatten().bincount(minlength=block.experts.num_experts).tolist()
        token = order // expert_TK.shape[1]
        gated, up = block.module.input_linear(x_TD[token], sizes).chunk(2, dim=-1)
        out = block.module.output_linear(block.module.activation(gated) * up, sizes)
        return torch.zeros_like(x_TD).index_add(0, token, (out * gate_TK.flatten()[order, None]).to(x_TD.dtype))

    def answer(self, block, y_TD, given):
        return y_TD.view_as(given[0]) + block.module.bias


def recipe(block):
    return "topk", {"renorm": True}
