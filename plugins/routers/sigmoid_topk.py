import attrs
from torch.nn.functional import logsigmoid

from moe_engine import GroupLimitedRouter, assign, groups_problem, hookimpl, option


@attrs.define(eq=False)
class SigmoidTopK:
    """Top-k of sigmoid scores (DeepSeek-V3).

    a = sigmoid(x W); S = top-K of a + b, b the selection biases; gates g_i = scale a_i / sum_S a, or scale a_i without
    `renorm`. At K = 1 the gate is scale a_i, because a normalised single gate is constant. Losses see a over its sum
    as probabilities. DeepSeek-V3 (256 experts, K = 8) uses scale 2.5, 8 groups, 4 kept, group_score=top2.

    Source: DeepSeek-AI, 2024 (DeepSeek-V3 Technical Report), eq. 12-16.
    """

    renorm: bool | None = option(None, help="divide a token's gates by their sum; unset: only if K > 1")
    scale: float = option(1.0, help="factor of every gate; with renorm, the sum of a token's gates", min=0)
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
            return "sigmoid_topk.renorm at top_k=1 makes every gate constant, so the router can't learn; leave it unset"
        return groups_problem(setup.spec, self.groups, self.groups_kept)

    @hookimpl
    def moe_router(self, spec):
        return SigmoidRouter(spec, self)


class SigmoidRouter(GroupLimitedRouter):
    def __init__(self, spec, options):
        super().__init__(spec, options.groups, options.groups_kept, options.group_score)
        self.renorm = spec.top_k > 1 if options.renorm is None else options.renorm
        self.scale = options.scale

    def select(self, tokens, levels):
        (level,) = levels
        log_a_TE = logsigmoid(level.biased)  # quotients of a are softmaxes of log a: exact where a itself is 0
        expert_TK = self.select_by(level, log_a_TE.exp()).topk(self.top_k, dim=-1).indices
        log_TK = log_a_TE.gather(-1, expert_TK)
        gate_TK = log_TK.softmax(-1) if self.renorm else log_TK.exp()
        return log_a_TE.softmax(-1), assign(self.scale * gate_TK, expert_TK, tokens)
