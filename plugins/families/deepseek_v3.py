import attrs
import torch

from moe_engine import GATE, STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class DeepseekV3:
    """DeepSeek-V3 and its kin: sigmoid scores.

    Selection by sigmoid(x W) + b, b the correction bias, within the best groups; gates are the sigmoids over their sum,
    times routed_scaling_factor. GLM-4 MoE and dots.llm1 have the same blocks.

    Sources: DeepSeek-AI, 2024 (DeepSeek-V3); GLM-4.5 Team, 2025; rednote-hilab, 2025 (dots.llm1).
    """

    @hookimpl
    def moe_family(self):
        tensors = {**GATE, "gate.e_score_correction_bias": Stored("state"), **STACKED}
        return Family(tensors=tensors, recipe=recipe, score=torch.sigmoid)


def recipe(block):
    options = {"renorm": bool(block.setting("norm_topk_prob"))}
    options |= {"scale": float(block.setting("routed_scaling_factor", default=1.0))}
    groups, kept = block.setting("num_group", "n_group"), block.setting("topk_group")
    if groups != kept:
        options |= {"groups": groups, "groups_kept": kept, "group_score": "top2"}
    return "sigmoid_topk", options
