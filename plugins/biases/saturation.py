"""Saturation: experts that receive little gradient are offered more tokens."""

import attrs
import torch

from moe_engine import Bias, centred_log, count_by, hookimpl, option


@attrs.define(eq=False)
class Saturation:
    """A selection bias from each expert's share of the gradient, in its working form.

    log (default): s <- decay s + (1 - decay) m;  b_i = -beta (log(r_i + eps) - mean_j log(r_j + eps)),
    r = s / mean(s). It is added for selection only; gates stay unbiased. m_i is the gradient mass
    sum_t g_ti |dL/dy_t| (signal=mass), or the mean |gradient| of the expert's weights (signal=weights).
    Equal gradients give b = 0; the scale of the loss does not matter; an idle expert's bias rises by
    beta |ln decay| a step against the others'.

    published: z = logits + beta (1 - s) in gates and selection, s from 0.5 on mean |gradient|. Kept for
    study: with gradients near 1e-4, s is near 0 for all, so that all get the same bias, which does nothing.

    Source of the published form: kennycason/srnn, 2025. The log form is this project's.
    """

    needs = ("logits", "load")
    form: str = option("log", help="log works; published is kept for study", choices=("log", "published"))
    signal: str | None = option(None, help="unset: mass for log, weights for published", choices=("mass", "weights"))
    beta: float | None = option(None, help="strength; unset: 1 for log, 0.5 for published", min=0)
    decay: float = option(0.9, help="memory of the running mean", min=0, max=1)
    eps: float = option(1e-6, help="smallest relative signal that log sees", min=1e-30)

    @hookimpl
    def moe_check(self, setup):
        if self.form == "published" and self.signal == "mass":
            return "saturation.form=published reads weight gradients; leave saturation.signal unset"
        return None

    @hookimpl
    def moe_bias(self, spec, level):
        if self.form == "published":
            return PublishedBias(level.size, 0.5 if self.beta is None else self.beta, self.decay)
        return LogBias(level.size, 1.0 if self.beta is None else self.beta, self.decay, self.eps, self.signal or "mass")


class LogBias(Bias):
    def __init__(self, size, beta, decay, eps, signal):
        super().__init__()
        self.beta, self.decay, self.eps = beta, decay, eps
        self.wants_signal, self.wants_expert_grad = signal == "mass", signal == "weights"
        self.expert_buffer("s", torch.zeros(size), new="mean")

    def forward(self):
        return -self.beta * centred_log(self.s, self.eps)

    def signal(self, grad_TD, token_N, unit_N, weight_N):
        """Gradient mass: sum_t g_ti |dL/dy_t|, in which tokens do not cancel."""
        norm_T = grad_TD.float().norm(dim=-1)
        return count_by(unit_N, weight_N.float() * norm_T[token_N], self.s.shape[0])

    def after_step(self, step):
        m = step.signal if self.wants_signal else step.expert_grad
        some = (m.sum() > 0).to(self.s.dtype)  # no data moves nothing
        self.s.lerp_(m.to(self.s.dtype), (1 - self.decay) * some)


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
        some = (step.expert_grad.sum() > 0).to(self.s.dtype)
        self.s.lerp_(step.expert_grad.to(self.s.dtype), (1 - self.decay) * some)
