import attrs

from moe_engine import Family, Stored, hookimpl
from moe_engine.testing import tiny_model


@attrs.define(eq=False)
class Dbrx:
    """DBRX: softmax gates divided by their p-norm.

    The experts' rows lie one after the other, [E F, D]; an adopted model has them as [E, F, D].

    Source: Databricks, 2024 (Introducing DBRX).
    """

    @hookimpl
    def moe_family(self):
        return Family(router="router", tensors=TENSORS, count=("ffn_config.moe_num_experts",), recipe=recipe)

    def trial_model(self):
        # what transformers 5 reads, and its default config lacks
        return tiny_model("dbrx", **{"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0})


TENSORS = {
    "router.layer.weight": Stored("logit_row", fan_in=1),
    "experts.mlp.w1": Stored("in", fan_in=2, flat=True, hidden=1),
    "experts.mlp.v1": Stored("in", fan_in=2, flat=True, hidden=1),
    "experts.mlp.w2": Stored("output", fan_in=1, flat=True, hidden=1),
}


def recipe(block):
    order = block.module.moe_normalize_expert_weights
    return "topk", {"renorm": order is not None, "renorm_p": float(order or 1)}
