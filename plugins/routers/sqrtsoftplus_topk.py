import attrs
import torch
from torch.nn.functional import softplus

from moe_engine import LinearRouter, assign, hookimpl, option


@attrs.define(eq=False)
class SqrtSoftplusTopK:
    """Top-k of square roots of softplus scores (DeepSeek-V4).

    a = sqrt(log(1 + exp(x W))); S = top-K of a + b, b the selection biases; gates g_i = scale a_i / sum_S a. At K = 1
    the gate is scale a_i, because a normalised single gate is constant. Losses see a over its sum as probabilities.
    Unlike a sigmoid the score does not saturate.

    Source: DeepSeek-AI, 2026 (DeepSeek-V4).
    """

    scale: float = option(1.0, help="factor of every gate; for K > 1, the sum of a token's gates", min=0)

    @hookimpl
    def moe_router(self, spec):
        return SqrtSoftplusRouter(spec, self.scale)


class SqrtSoftplusRouter(LinearRouter):
    def __init__(self, spec, scale):
        super().__init__(spec)
        self.scale = scale

    def select(self, tokens, levels):
        (level,) = levels
        # log softplus(s) is s to the last bit below -40, where softplus would soon underflow
        log_TE = torch.where(level.biased < -40, level.biased, softplus(level.biased.clamp(min=-40)).log())
        log_a_TE = log_TE / 2  # quotients of a are softmaxes of log a: exact where a itself is 0
        expert_TK = level.select_by(log_a_TE.exp()).topk(self.top_k, dim=-1).indices
        log_TK = log_a_TE.gather(-1, expert_TK)
        gate_TK = log_TK.softmax(-1) if self.top_k > 1 else log_TK.exp()
        return log_a_TE.softmax(-1), assign(self.scale * gate_TK, expert_TK, tokens)
