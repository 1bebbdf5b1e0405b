import attrs

from moe_engine import GATE, STACKED, Family, Stored, hookimpl


@attrs.define(eq=False)
class Ernie45Moe:
    """ERNIE 4.5: probabilities with a selection bias.

    Selection by softmax(x W) + b; gates are the chosen probabilities over their sum.

    Source: Baidu, 2025 (ERNIE 4.5 Technical Report).
    """

    @hookimpl
    def moe_family(self):
        bias = {"gate.moe_statics.e_score_correction_bias": Stored("state", axis=1)}
        return Family(tensors={**GATE, **bias, **STACKED}, recipe=recipe)


def recipe(block):
    return "topk", {"renorm": True, "scores": "probs"}
