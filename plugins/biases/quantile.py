"""Quantile balancing: the selection bias that would have balanced the last step."""

import attrs
import torch

from moe_engine import Bias, Traits, UsageError, hookimpl, option


@attrs.define(eq=False)
class Quantile:
    """b = -beta, where beta_i is set so that expert i would have got T K / E tokens of the step before.

    a_t = the (K+1)-th largest of s_t - beta; new beta_i = the (T K / E + 1)-th largest over tokens of s_ti - a_t, s
    the scores that the router selects by; averaged over micro-batches and processes, then centred;
    beta <- ema beta + (1 - ema) new. T K / E is rounded, T counts real tokens. It has no step size, and takes a
    few steps where a sign rule takes hundreds. For selection only; never of the batch that is routed.

    Source: Su, 2026 (quantile balancing), as in Megatron-LM.
    """

    traits = Traits(requires=("logits", "load", "top_k"), effects=("equal_load",))
    ema: float = option(0.0, help="share of the old value that a step keeps", min=0, max=1)

    @hookimpl
    def moe_check(self, setup):
        if others := [*setup.others(self, hook="moe_bias"), *setup.balance_losses]:
            return f"quantile already equalises the load; remove {others[0]} or quantile"
        return None

    @hookimpl
    def moe_bias(self, spec, level):
        if level.limited:
            raise UsageError("quantile counts on every expert being open to every token; set the router's groups to 1")
        return QuantileBias(level.size, level.top_k, self.ema) if level.top_k < level.size else None


class QuantileBias(Bias):
    def __init__(self, size, top_k, ema):
        super().__init__()
        self.top_k, self.ema = top_k, ema
        self.expert_buffer("beta", torch.zeros(size), new="parent")

    def forward(self):
        return -self.beta

    def adjust_rows(self, staged, plans):
        staged["beta"] -= staged["beta"].mean()

    def measure(self, level, tokens):
        scores_TE = level.scores.float()
        edge_T1 = (scores_TE - self.beta).topk(self.top_k + 1, dim=-1).values[:, -1:]
        above_TE = scores_TE - edge_T1
        if tokens.mask is not None:
            above_TE = above_TE.masked_fill(~tokens.mask[:, None], -torch.inf)
        place = (tokens.count * self.top_k / above_TE.shape[1]).round().long().minimum((tokens.count - 1).clamp(min=0))
        some = tokens.count > 0
        new_E = (
            above_TE.sort(dim=0, descending=True).values.index_select(0, place.view(1))[0]
            if len(above_TE)
            else self.beta
        )
        return {"beta": torch.where(some & new_E.isfinite(), new_E, 0), "forwards": some.float().view(1)}

    def after_step(self, step):
        forwards = step.own["forwards"].sum()
        new_E = step.own["beta"] / forwards.clamp(min=1)
        self.beta.lerp_((new_E - new_E.mean()).to(self.beta), (1 - self.ema) * (forwards > 0).to(self.beta.dtype))
