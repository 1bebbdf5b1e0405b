"""Routing by direction: top-k of cosines."""

import attrs
from moe_engine import LevelSpec, Router, assign, hookimpl, linear_logits, option, uniform
from torch.nn.functional import normalize


@attrs.define(eq=False)
class Cosine:
    """The K experts whose rows point most nearly where the token points.

    s_i = cos(x, w_i) / temperature; p = softmax(s); S = top-K of s plus the selection biases; gate g_i = p_i, i in S.
    The lengths of x and w have no influence, so no expert wins by a long row. The price: |s| is at most
    1 / temperature, which limits how confident the router can be.

    Source: Chi et al., 2022 (X-MoE), without its low-dimensional projection and with a fixed temperature.
    """

    temperature: float = option(0.2, help="below 1 makes the gates sharper", min=0.01)

    @hookimpl
    def moe_router(self, spec):
        return CosineRouter(spec, self.temperature)


class CosineRouter(Router):
    def __init__(self, spec, temperature):
        super().__init__()
        self.top_k, self.temperature = spec.top_k, temperature
        self.expert_param("weight", (spec.experts, spec.dim), fresh=uniform(spec.dim), role="logit_row")

    @property
    def levels(self):
        return (LevelSpec("expert", self.weight.shape[0], self.top_k),)

    def score(self, tokens):
        dots_TE = linear_logits(tokens.x, normalize(self.weight, dim=-1))
        length_T1 = tokens.x.norm(dim=-1, keepdim=True, dtype=dots_TE.dtype).clamp(min=1e-6)  # a token may be 0
        return (dots_TE / (length_T1 * self.temperature),)

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        expert_TK = level.select_by(level.biased).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)
