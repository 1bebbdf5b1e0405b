import attrs

from moe_engine import Family, hookimpl


@attrs.define(eq=False)
class SwitchTransformers:
    """Switch Transformer, for reading.

    The gate is the raw probability, 0 beyond the capacity of each sequence.

    Source: Fedus et al., 2021 (Switch Transformers).
    """

    @hookimpl
    def moe_family(self):
        return SwitchFamily(router="router", logits=2, decides="router")


class SwitchFamily(Family):
    """The router returns a one-hot choice [B, S, E], all 0 if it was dropped, and its probability [B, S, 1]."""

    def decision(self, block, given, routed):
        chosen, probs, logits = (value.flatten(0, -2) for value in routed.returned)
        return routed.states.flatten(0, -2), logits.argmax(-1, keepdim=True), probs * chosen.sum(-1, keepdim=True)
