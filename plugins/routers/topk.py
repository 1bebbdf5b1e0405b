import attrs

from moe_engine import GroupLimitedRouter, assign, groups_problem, hookimpl, option


@attrs.define(eq=False)
class TopK:
    """Top-k of softmax probabilities (Switch, Mixtral).

    p = softmax(x W); S = top-K of the biased logits; gates g_i = p_i for i in S, divided by their sum with `renorm`.
    At K = 1 the gate is the raw probability (Switch): renormalised it would be the constant 1, and the router would
    get no gradient.

    Sources: Fedus et al., 2021 (Switch Transformers, K = 1); Jiang et al., 2024 (Mixtral of Experts, renormalised);
    DeepSeek-AI, 2024 (DeepSeek-V3, groups).
    """

    renorm: bool | None = option(None, help="divide a token's gates by their sum; unset: only if K > 1")
    groups: int = option(1, help="number of equally sized groups of experts", min=1)
    groups_kept: int = option(1, help="number of best groups a token may choose from", min=1)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k == 1 and self.renorm and not setup.spec.allow_no_gradient:
            return "topk.renorm at top_k=1 makes every gate the constant 1, so the router can't learn; leave it unset"
        return groups_problem(setup.spec, self.groups, self.groups_kept)

    @hookimpl
    def moe_router(self, spec):
        renorm = spec.top_k > 1 if self.renorm is None else self.renorm
        return TopKRouter(spec, renorm, self.groups, self.groups_kept)


class TopKRouter(GroupLimitedRouter):
    def __init__(self, spec, renorm, groups, groups_kept):
        super().__init__(spec, groups, groups_kept)
        self.renorm = renorm

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        expert_TK = self.select_by(level, level.biased).topk(self.top_k, dim=-1).indices
        gate_TK = probs_TE.gather(-1, expert_TK)
        if self.renorm:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return probs_TE, assign(gate_TK, expert_TK, tokens)
