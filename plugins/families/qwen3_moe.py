import attrs

from moe_engine import GATE, STACKED, Family, hookimpl


@attrs.define(eq=False)
class Qwen3Moe:
    """Qwen2-MoE, Qwen3-MoE, Qwen3-Next and OLMoE: top-k of a softmax, renormalised if the config says so.

    Sources: Qwen Team, 2024 (Qwen1.5-MoE) and 2025 (Qwen3); Muennighoff et al., 2024 (OLMoE).
    """

    @hookimpl
    def moe_family(self):
        return Family(tensors={**GATE, **STACKED}, count="num_experts", recipe=recipe)


def recipe(block):
    return "topk", {"renorm": bool(block.setting("norm_topk_prob"))}
