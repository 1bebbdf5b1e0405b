import math

import attrs
import torch
from torch.nn.functional import normalize

from moe_engine import LevelSpec, Router, Slots, Traits, causal_problem, hookimpl, option, uniform


@attrs.define(eq=False)
class Soft:
    """Experts process weighted mixtures of tokens (Soft MoE).

    l = scale x^ phi^ of unit vectors x^ and phi^; dispatch D = softmax of l over a sequence's tokens;
    combine C = softmax of l over all E n slots, n = `slots` per expert; slot = D^T x; y = C F(slot).

    Nothing is chosen or dropped, so there is no load: balance losses and biases have nothing to act on, and top_k
    has no effect. probs are a token's combine weights summed by expert. A sequence is the axis before the last;
    called with [T, D], each token is a sequence and the layer a dense mixture. Not causal. Padding is ignored.

    Source: Puigcerver et al., 2023 (From Sparse to Soft Mixtures of Experts).
    """

    traits = Traits(provides=("probs",))
    slots: int = option(1, help="slots per expert and sequence", min=1)
    allow_noncausal: bool = option(False, help="allow use in a causal layer, where it sees later tokens")

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.limited:
            return "soft has a fixed number of slots instead of a capacity; set neither capacity nor eval_capacity"
        return causal_problem(setup.spec, "soft", self.allow_noncausal)

    @hookimpl
    def moe_router(self, spec):
        return SoftRouter(spec, self.slots)


class SoftRouter(Router):
    def __init__(self, spec, slots):
        super().__init__()
        self.expert_param("phi", (spec.experts, slots, spec.dim), fresh=uniform(spec.dim), role="logit_row")
        self.scale = torch.nn.Parameter(torch.ones(()))

    @property
    def levels(self):
        return (LevelSpec("slot", self.phi.shape[0] * self.phi.shape[1], 0),)

    def score(self, tokens):
        dtype = torch.promote_types(tokens.x.dtype, torch.float32)
        x_TD, phi_SD = (normalize(v.to(dtype), dim=-1, eps=1e-6) for v in (tokens.x, self.phi.flatten(0, 1)))
        return (self.scale.to(dtype) * x_TD @ phi_SD.t(),)

    def select(self, tokens, levels):
        (level,) = levels
        sequences = tokens.shape if len(tokens.shape) > 1 else (*tokens.shape, 1)
        logits_GSEn = level.biased.view(math.prod(sequences[:-1]), sequences[-1], *self.phi.shape[:2])
        real_GS11 = torch.ones_like(logits_GSEn[..., :1, :1], dtype=torch.bool)
        if tokens.mask is not None:
            real_GS11 = tokens.mask.view_as(real_GS11)
        dispatch = logits_GSEn.masked_fill(~real_GS11, torch.finfo(logits_GSEn.dtype).min).softmax(1) * real_GS11
        combine = logits_GSEn.flatten(2).softmax(-1).view_as(logits_GSEn) * real_GS11
        return combine.sum(-1).flatten(0, 1), Slots(dispatch, combine)
