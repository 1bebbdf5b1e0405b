"""Top-k routing on sigmoid scores."""

import attrs

from moe_engine import LinearRouter, assign, groups_problem, hookimpl, keep_best_groups, option


@attrs.define(eq=False)
class SigmoidTopK:
    """The K experts of highest sigmoid score, as in DeepSeek-V3.

    a = sigmoid(x W); S = top-K of a + b, b the selection biases; gate g_i = scale a_i / sum_S a, and
    at K = 1 scale a_i, because a normalised single gate would be a constant. Probabilities for losses
    are a over its sum. DeepSeek-V3 (256 experts, K = 8) uses scale 2.5, 8 groups, 4 kept.

    Source: DeepSeek-AI, 2024 (DeepSeek-V3).
    """

    scale: float = option(1.0, help="what a token's gates sum to", min=0)
    groups: int = option(1, help="number of equal groups of experts", min=1)
    groups_kept: int = option(1, help="best groups that a token may choose from", min=1)

    @hookimpl
    def moe_check(self, setup):
        return groups_problem(setup.spec, self.groups, self.groups_kept) if self.groups > 1 else None

    @hookimpl
    def moe_router(self, spec):
        return SigmoidRouter(spec, self.scale, self.groups, self.groups_kept)


class SigmoidRouter(LinearRouter):
    def __init__(self, spec, scale, groups, groups_kept):
        super().__init__(spec)
        self.scale, self.groups, self.groups_kept = scale, groups, groups_kept

    def select(self, tokens, levels):
        (level,) = levels
        a_TE = level.biased.sigmoid()
        scores_TE = level.select_by(a_TE)
        if self.groups > 1:
            scores_TE = keep_best_groups(scores_TE, self.groups, self.groups_kept, self.top_k)
        expert_TK = scores_TE.topk(self.top_k, dim=-1).indices
        gate_TK = a_TE.gather(-1, expert_TK)
        if self.top_k > 1:
            gate_TK = gate_TK / (gate_TK.sum(-1, keepdim=True) + 1e-20)
        probs_TE = a_TE / (a_TE.sum(-1, keepdim=True) + 1e-20)
        return probs_TE, assign(self.scale * gate_TK, expert_TK, tokens)
