import attrs

from moe_engine import GATE, STACKED, Family, hookimpl


@attrs.define(eq=False)
class Qwen3Moe:
    """Qwen MoE and OLMoE: top-k of a softmax.

    g = the K largest of softmax(x W), divided by their sum if the config's norm_topk_prob says so. Qwen2-MoE,
    Qwen3-MoE, Qwen3-Next and OLMoE.

    Sources: Qwen Team, 2024 (Qwen1.5-MoE) and 2025 (Qwen3); Muennighoff et al., 2024 (OLMoE).
    """

    @hookimpl
    def moe_family(self):
        return Family(tensors={**GATE, **STACKED}, recipe=recipe)


def recipe(block):
    return "topk", {"renorm": bool(block.setting("norm_topk_prob"))}
