import attrs

from moe_engine import STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class GraniteMoe:
    """Granite 3 MoE: a softmax over the top-k logits.

    Which is the softmax over all experts, renormalised over the chosen ones.

    Source: IBM, 2024 (Granite 3.0 Language Models).
    """

    @hookimpl
    def moe_family(self):
        tensors = {"router.weight": Stored("logit_row", fan_in=1), **STACKED}
        return Family(router="router", tensors=tensors, recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True}
