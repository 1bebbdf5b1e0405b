"""Saturation: experts that receive little gradient are offered more tokens."""

import attrs
import torch

from moe_engine import Bias, centred_log, count_by, hookimpl, option


@attrs.define(eq=False)
class Saturation:
    """A selection bias from each expert's share of the gradient, in its working form.

    log (default): s <- decay s + (1 - decay) m;  b_i = -beta (log(r_i + eps) - mean_j log(r_j + eps)),
    r = s / mean(s), for selection only. m_i = sum_t (g_ti |dL/dy_t|)^power over expert i's tokens (signal=mass), or
    the mean |gradient| of its weights (signal=weights), in which tokens cancel. power=0 would count tokens, 1 adds
    gradients up; between them newcomers, whose tokens have larger gradients, are throttled less. Equal signals give
    b = 0; the scale of the loss does not matter; an idle expert's bias rises by beta |ln decay| a step.

    published: z = logits + beta (1 - s) in gates and selection, s from 0.5 on mean |gradient|. Kept for study: with
    gradients near 1e-4 all get the same bias. Source of it: kennycason/srnn, 2025. The log form is this project's.
    """

    needs = ("logits", "load")
    form: str = option("log", help="log works; published is kept for study", choices=("log", "published"))
    signal: str | None = option(None, help="unset: mass for log, weights for published", choices=("mass", "weights"))
    beta: float | None = option(None, help="strength; unset: 1.5 for log, 0.5 for published", min=0)
    decay: float = option(0.9, help="memory of the running mean", min=0, max=1)
    power: float = option(0.5, help="exponent of a token's gradient in the mass", min=0.01, max=1)
    eps: float = option(1e-6, help="smallest relative signal that log sees", min=1e-30)

    @hookimpl
    def moe_check(self, setup):
        clash = self.form == "published" and self.signal == "mass"
        return "saturation.form=published reads weight gradients; leave saturation.signal unset" if clash else None

    @hookimpl
    def moe_bias(self, spec, level):
        if self.form == "published":
            return PublishedBias(level.size, 0.5 if self.beta is None else self.beta, self.decay)
        power = None if self.signal == "weights" else self.power
        return LogBias(level.size, 1.5 if self.beta is None else self.beta, self.decay, self.eps, power)


class LogBias(Bias):
    def __init__(self, size, beta, decay, eps, power):
        super().__init__()
        self.beta, self.decay, self.eps, self.power = beta, decay, eps, power
        self.wants_signal, self.wants_expert_grad = power is not None, power is None
        self.expert_buffer("s", torch.zeros(size), new="mean")

    def forward(self):
        return -self.beta * centred_log(self.s, self.eps)

    def signal(self, grad_TD, token_N, unit_N, weight_N):
        norm_N = weight_N.float() * grad_TD.float().norm(dim=-1)[token_N]
        return count_by(unit_N, norm_N.pow(self.power), self.s.shape[0])

    def after_step(self, step):
        follow(self.s, step.signal if self.wants_signal else step.expert_grad, self.decay)


class PublishedBias(Bias):
    selection_only = False
    wants_expert_grad = True

    def __init__(self, size, beta, decay):
        super().__init__()
        self.beta, self.decay = beta, decay
        self.expert_buffer("s", torch.full((size,), 0.5), new=0.5)

    def forward(self):
        return self.beta * (1 - self.s)

    def after_step(self, step):
        follow(self.s, step.expert_grad, self.decay)


def follow(s, m, decay):
    """s <- decay s + (1 - decay) m, in place; no data moves nothing."""
    s.lerp_(m.to(s.dtype), (1 - decay) * (m.sum() > 0).to(s.dtype))
