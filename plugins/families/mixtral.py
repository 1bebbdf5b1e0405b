import attrs

from moe_engine import GATE, STACKED, Family, hookimpl


@attrs.define(eq=False)
class Mixtral:
    """Mixtral, and MiniMax-01, whose blocks are the same: top-k of a softmax, renormalised.

    Sources: Jiang et al., 2024 (Mixtral of Experts); MiniMax, 2025 (MiniMax-01).
    """

    @hookimpl
    def moe_family(self):
        return Family(tensors={**GATE, **STACKED}, count="num_local_experts", recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True}
