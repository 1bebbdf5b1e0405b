import attrs
import torch

from moe_engine import Bias, Traits, UsageError, hookimpl, option


@attrs.define(eq=False)
class Quantile:
    """The bias that would have balanced the previous step.

    b = -beta, with beta_i such that expert i would have received T K / E tokens of the previous step: a_t = the
    (K+1)-th largest of s_t - beta; new beta_i = the (T K / E + 1)-th largest over tokens of s_ti - a_t; s are the
    router's selection scores. It is averaged over micro-batches and processes and centred;
    beta <- ema beta + (1 - ema) new. T K / E is rounded, and T counts real tokens. There is no step size: it balances
    in a few steps, where a sign rule needs hundreds. For selection only; never computed from the batch being routed.

    Source: Su, 2026 (quantile balancing), as in Megatron-LM.
    """

    traits = Traits(requires=("logits", "load", "top_k"), effects=("equal_load",), per_rank=True)
    ema: float = option(0.0, help="share of the old value kept at each step", min=0, max=1)

    @hookimpl
    def moe_check(self, setup):
        if others := [*setup.others(self, hook="moe_bias"), *setup.balance_losses]:
            return f"quantile already equalises the load; remove {others[0]} or quantile"
        return None

    @hookimpl
    def moe_bias(self, spec, level):
        if level.limited:
            raise UsageError("quantile needs every expert open to every token; set groups to 1", code="limited-groups")
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
        any_token = tokens.count > 0
        new_E = self.beta
        if len(above_TE):
            new_E = above_TE.sort(dim=0, descending=True).values.index_select(0, place.view(1))[0]
        return {"beta": torch.where(any_token & new_E.isfinite(), new_E, 0), "forwards": any_token.float().view(1)}

    def after_step(self, step):
        forwards = step.own["forwards"].sum()
        new_E = step.own["beta"] / forwards.clamp(min=1)
        self.beta.lerp_((new_E - new_E.mean()).to(self.beta), (1 - self.ema) * (forwards > 0).to(self.beta.dtype))
