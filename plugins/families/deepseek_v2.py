import attrs

from moe_engine import GATE, STACKED, Family, hookimpl


@attrs.define(eq=False)
class DeepseekV2:
    """DeepSeek-V2: scaled softmax gates.

    g_i = s p_i, s = routed_scaling_factor; with group_limited_greedy from the groups whose best expert is best.

    Source: DeepSeek-AI, 2024 (DeepSeek-V2).
    """

    @hookimpl
    def moe_family(self):
        return Family(tensors={**GATE, **STACKED}, recipe=recipe)


def recipe(block):
    if block.setting("topk_method", default="greedy") not in ("greedy", "group_limited_greedy"):
        return None
    options = {"renorm": False, "scale": float(block.setting("routed_scaling_factor", default=1.0))}
    if block.setting("topk_method") == "group_limited_greedy":
        options |= {"groups": block.setting("num_group", "n_group"), "groups_kept": block.setting("topk_group")}
        options |= {"group_score": "max"}
    return "topk", options
