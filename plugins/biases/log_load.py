import attrs
import torch

from moe_engine import Bias, Traits, centred_log, ema_update_, hookimpl, option


@attrs.define(eq=False)
class LogLoad:
    """Selection bias from the log of each expert's load.

    s <- decay s + (1 - decay) load; b_i = -beta (log(r_i + eps) - mean_j log(r_j + eps)) with r = s / mean(s). This
    is the law of `saturation` on plain counts, without the gradient, and serves as its control. Equal loads give 0.

    Source: this project.
    """

    traits = Traits(requires=("logits", "load"), effects=("equal_load",))
    beta: float = option(1.5, help="strength of the bias", min=0)
    decay: float = option(0.95, help="decay of the running mean", min=0, max=1)
    eps: float = option(1e-6, help="added to the relative load before the log", min=1e-30)

    @hookimpl
    def moe_bias(self, spec, level):
        return LogLoadBias(level.size, self.beta, self.decay, self.eps)


class LogLoadBias(Bias):
    def __init__(self, size, beta, decay, eps):
        super().__init__()
        self.beta, self.decay, self.eps = beta, decay, eps
        self.expert_buffer("s", torch.zeros(size), new="mean")

    def forward(self):
        return -self.beta * centred_log(self.s, self.eps)

    def after_step(self, step):
        ema_update_(self.s, step.load, self.decay)
