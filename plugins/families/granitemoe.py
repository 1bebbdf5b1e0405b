import attrs

from moe_engine import STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class GraniteMoe:
    """Granite 3 MoE: top-k of the logits, and a softmax over them.

    Source: IBM, 2024 (Granite 3.0 Language Models).
    """

    @hookimpl
    def moe_family(self):
        tensors = {"router.weight": Stored("logit_row", fan_in=1), **STACKED}
        return Family(router="router", tensors=tensors, count="num_local_experts", recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True}
