import attrs
from torch.nn.functional import logsigmoid

from moe_engine import GroupLimitedRouter, assign, groups_problem, hookimpl, option


@attrs.define(eq=False)
class SigmoidTopK:
    """Top-k of sigmoid scores (DeepSeek-V3).

    a = sigmoid(x W); S = top-K of a + b, b the selection biases; gates g_i = scale a_i / sum_S a. At K = 1 the gate
    is scale a_i, because a normalised single gate is constant. Losses see a over its sum as probabilities.
    DeepSeek-V3 (256 experts, K = 8) uses scale 2.5, 8 groups, 4 kept.

    Source: DeepSeek-AI, 2024 (DeepSeek-V3 Technical Report), eq. 12-16.
    """

    scale: float = option(1.0, help="sum of a token's gates", min=0)
    groups: int = option(1, help="number of equally sized groups of experts", min=1)
    groups_kept: int = option(1, help="number of best groups a token may choose from", min=1)

    @hookimpl
    def moe_check(self, setup):
        return groups_problem(setup.spec, self.groups, self.groups_kept)

    @hookimpl
    def moe_router(self, spec):
        return SigmoidRouter(spec, self.scale, self.groups, self.groups_kept)


class SigmoidRouter(GroupLimitedRouter):
    def __init__(self, spec, scale, groups, groups_kept):
        super().__init__(spec, groups, groups_kept)
        self.scale = scale

    def select(self, tokens, levels):
        (level,) = levels
        log_a_TE = logsigmoid(level.biased)  # quotients of a are softmaxes of log a: exact where a itself is 0
        expert_TK = self.select_by(level, log_a_TE.exp()).topk(self.top_k, dim=-1).indices
        log_TK = log_a_TE.gather(-1, expert_TK)
        gate_TK = log_TK.softmax(-1) if self.top_k > 1 else log_TK.exp()
        return log_a_TE.softmax(-1), assign(self.scale * gate_TK, expert_TK, tokens)
