import attrs

from moe_engine import GATE, STACKED, Family, hookimpl


@attrs.define(eq=False)
class Mixtral:
    """Mixtral and MiniMax-01: top-k of a softmax, renormalised.

    g = the K largest of softmax(x W), divided by their sum; F_i(x) = W_down (silu(W_gate x) * W_up x).

    Sources: Jiang et al., 2024 (Mixtral of Experts); MiniMax, 2025 (MiniMax-01).
    """

    @hookimpl
    def moe_family(self):
        return Family(tensors={**GATE, **STACKED}, recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True}
