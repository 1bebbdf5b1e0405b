import attrs

from moe_engine import GroupLimitedRouter, assign, groups_problem, hookimpl, option, zeros


@attrs.define(eq=False)
class TopK:
    """Top-k of softmax probabilities (Switch, Mixtral).

    p = softmax(x W + c), c a learned bias with `router_bias`; S = top-K of the logits, or of p with `scores=probs`,
    plus the selection biases; gates g_i = scale p_i for i in S, with `renorm` divided by the norm (sum_S p^q)^(1/q),
    q = `renorm_p`. At K = 1 the gate is the raw probability (Switch): renormalised it would be the constant 1, and
    the router would get no gradient.

    Sources: Fedus et al., 2021 (Switch Transformers, K = 1); Jiang et al., 2024 (Mixtral of Experts, renormalised);
    DeepSeek-AI, 2024 (DeepSeek-V2, scale, group_score=max; DeepSeek-V3, groups); Databricks, 2024 (DBRX, renorm_p=2);
    OpenAI, 2025 (gpt-oss, router_bias); Baidu, 2025 (ERNIE 4.5, scores=probs).
    """

    renorm: bool | None = option(None, help="divide a token's gates by their norm; unset: only if K > 1")
    renorm_p: float = option(1.0, help="order of that norm: 1 = gates sum to 1, 2 = their squares do", min=1, max=100)
    scale: float = option(1.0, help="factor of every gate", min=0)
    scores: str = option("logits", help="what is ranked and selection biases shift", choices=("logits", "probs"))
    router_bias: bool = option(False, help="add a learned bias to the logits")
    groups: int = option(1, help="number of equally sized groups of experts", min=1)
    groups_kept: int = option(1, help="number of best groups a token may choose from", min=1)
    group_score: str = option(
        "sum",
        help="score of a group: the sum of its best K / groups_kept scores or of its best two, or its best one",
        choices=("sum", "top2", "max"),
    )

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k == 1 and self.renorm and not setup.spec.allow_no_gradient:
            return "topk.renorm at top_k=1 makes every gate the constant 1, so the router can't learn; leave it unset"
        return groups_problem(setup.spec, self.groups, self.groups_kept)

    @hookimpl
    def moe_router(self, spec):
        return TopKRouter(spec, self)


class TopKRouter(GroupLimitedRouter):
    """weight [E, D], and bias [E] or None."""

    def __init__(self, spec, options):
        super().__init__(spec, options.groups, options.groups_kept, options.group_score)
        self.renorm = spec.top_k > 1 if options.renorm is None else options.renorm
        self.renorm_p, self.scale, self.by_probs = options.renorm_p, options.scale, options.scores == "probs"
        if options.router_bias:
            self.expert_param("bias", (spec.experts,), fresh=zeros, role="logit_bias")
        else:
            self.bias = None

    def score(self, tokens):
        (logits_TE,) = super().score(tokens)
        return (logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype),)

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        by_TE = self.select_by(level, probs_TE if self.by_probs else level.biased)
        expert_TK = by_TE.topk(self.top_k, dim=-1).indices
        gate_TK = probs_TE.gather(-1, expert_TK)
        if self.renorm:
            gate_TK = gate_TK / gate_TK.pow(self.renorm_p).sum(-1, keepdim=True).pow(1 / self.renorm_p)
        return probs_TE, assign(self.scale * gate_TK, expert_TK, tokens)
