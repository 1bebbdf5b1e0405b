import attrs
import torch

from moe_engine import Bias, Traits, at_least_fp32, centred_log, count_by, ema_update_, hookimpl, option


@attrs.define(eq=False)
class Saturation:
    """Offer more tokens to experts with little gradient.

    s <- decay s + (1 - decay) m; b_i = -beta (log(r_i + eps) - mean_j log(r_j + eps)) with r = s / mean(s); for
    selection only. signal=mass: m_i = sum_t (g_ti |dL/dy_t|)^power over expert i's tokens; power = 1 adds gradients
    up, power -> 0 counts tokens, and values between them keep loads more even and give new experts more tokens.
    signal=weights: m_i = mean |gradient| of the expert's weights, where tokens cancel out. Equal signals give b = 0;
    the scale of the loss does not matter; an idle expert's bias rises by beta |ln decay| per step.

    Source: this project, after kennycason/srnn, 2025, whose published form is `absolute_saturation`.
    """

    traits = Traits(requires=("logits", "load"))
    signal: str = option("mass", help="what is measured of each expert", choices=("mass", "weights"))
    beta: float | None = option(None, help="strength of the bias; unset: 1.5 for mass, 1 for weights", min=0)
    decay: float = option(0.95, help="decay of the running mean", min=0, max=1)
    power: float = option(0.5, help="exponent of each token's gradient, for signal=mass", min=0.01, max=1)
    eps: float = option(1e-6, help="added to the relative signal before the log", min=1e-30)

    @hookimpl
    def moe_bias(self, spec, level):
        mass = self.signal == "mass"
        beta = (1.5 if mass else 1.0) if self.beta is None else self.beta
        return SaturationBias(level.size, beta, self.decay, self.eps, self.power if mass else None)


class SaturationBias(Bias):
    def __init__(self, size, beta, decay, eps, power):
        super().__init__()
        self.beta, self.decay, self.eps, self.power = beta, decay, eps, power
        self.wants_signal, self.wants_expert_grad = power is not None, power is None
        self.expert_buffer("s", torch.zeros(size), new="mean")

    def forward(self):
        return -self.beta * centred_log(self.s, self.eps)

    def signal(self, grad_TD, token_N, unit_N, weight_N):
        norm_N = at_least_fp32(weight_N) * at_least_fp32(grad_TD).norm(dim=-1)[token_N]
        return count_by(unit_N, norm_N.pow(self.power), self.s.shape[0])

    def after_step(self, step):
        ema_update_(self.s, step.signal if self.wants_signal else step.expert_grad, self.decay)
