import attrs

from moe_engine import Family, hookimpl


@attrs.define(eq=False)
class NllbMoe:
    """NLLB-MoE, for reading.

    The best two experts, with a gate of 0 where one was dropped.

    Source: NLLB Team, 2022 (No Language Left Behind).
    """

    @hookimpl
    def moe_family(self):
        return NllbFamily(router="router", logits=2, decides="router")


class NllbFamily(Family):
    """The router returns the gates [T, E]."""

    def decision(self, block, given, routed):
        _, gate_TE, logits_TE = routed.returned
        expert_TK = (logits_TE.softmax(-1) + gate_TE).topk(2, dim=-1).indices
        return routed.states.flatten(0, -2), expert_TK, gate_TE.gather(-1, expert_TK)
