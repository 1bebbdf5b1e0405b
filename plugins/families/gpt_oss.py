import attrs

from moe_engine import Family, Stored, hookimpl


@attrs.define(eq=False)
class GptOss:
    """gpt-oss: a router and experts with biases.

    Softmax over the K largest logits x W + c. Tensors are stored [E, D, 2H], gate and up interleaved.

    Source: OpenAI, 2025 (gpt-oss-120b & gpt-oss-20b Model Card).
    """

    @hookimpl
    def moe_family(self):
        return Family(router="router", tensors=TENSORS, recipe=recipe)


TENSORS = {
    "router.weight": Stored("logit_row", fan_in=1),
    "router.bias": Stored("logit_bias"),
    "experts.gate_up_proj": Stored("in", fan_in=1, hidden=2, interleaved=True),
    "experts.gate_up_proj_bias": Stored("in", hidden=1, interleaved=True),
    "experts.down_proj": Stored("output", fan_in=1, hidden=1),
    "experts.down_proj_bias": Stored("output"),
}


def recipe(block):
    return "topk", {"renorm": True}
