import attrs

from moe_engine import STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class HunYuanV1Moe:
    """Hunyuan-A13B: top-k of a softmax, renormalised.

    The router computes in fp32.

    Source: Tencent, 2025 (Hunyuan-A13B).
    """

    @hookimpl
    def moe_family(self):
        tensors = {"gate.wg.weight": Stored("logit_row", fan_in=1), **STACKED}
        return Family(tensors=tensors, recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True}
