"""A layerwise recurrent router: each layer's router remembers what the routers before it saw of a token.

h_l = GRU(P x_l, h_{l-1}), p = softmax(h_l W), the top K of it; h_0 = 0. P is a projection to the width of h. The
paper shares one GRU among all layers; here each layer has its own.

Source: Qiu et al., 2024 (Layerwise Recurrent Router for Mixture-of-Experts).

To use it, name the class in the entry points of a distribution of yours (docs/tutorial.md), and then:

    moe-engine run --task lm --set lm.every=1 --plugins recurrent,switch_aux
"""

import attrs
from torch import nn

from moe_engine import LevelSpec, Router, assign, hookimpl, linear_logits, option, uniform


@attrs.define(eq=False)
class Recurrent:
    """Top-k of a softmax over a state that is carried from layer to layer.

    Source: Qiu et al., 2024 (Layerwise Recurrent Router for Mixture-of-Experts).
    """

    width: int = option(32, help="width of the state that routers pass on", min=1)

    @hookimpl
    def moe_router(self, spec):
        return RecurrentRouter(spec, self.width)


class RecurrentRouter(Router):
    def __init__(self, spec, width):
        super().__init__()
        self.top_k, self.carries = spec.top_k, width
        self.project, self.cell = nn.Linear(spec.dim, width, bias=False), nn.GRUCell(width, width)
        self.expert_param("weight", (spec.experts, width), fresh=uniform(width), role="logit_row")

    @property
    def levels(self):
        return (LevelSpec("expert", len(self.weight), self.top_k),)

    def score(self, tokens):
        dtype = self.project.weight.dtype
        h_TC = self.cell(self.project(tokens.x.to(dtype)), tokens.carried.to(dtype))
        return (linear_logits(h_TC, self.weight),), h_TC

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = level.biased.softmax(-1)
        expert_TK = level.select_by(level.biased).topk(self.top_k, dim=-1).indices
        gate_TK = probs_TE.gather(-1, expert_TK)
        if self.top_k > 1:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return probs_TE, assign(gate_TK, expert_TK, tokens)
