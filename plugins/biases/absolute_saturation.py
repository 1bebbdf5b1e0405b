import attrs
import torch

from moe_engine import Bias, Traits, ema_update_, hookimpl, option


@attrs.define(eq=False)
class AbsoluteSaturation:
    """Bias from the size of each expert's gradients.

    z = logits + beta (1 - s), for gates and selection; s <- decay s + (1 - decay) m, 0.5 at first; m_i = mean
    |gradient| of expert i's weights. Kept for comparison with `saturation`, which uses shares: with gradients near
    1e-4 every s is near 0, so all experts get the same bias, which has no effect.

    Source: kennycason/srnn, 2025.
    """

    traits = Traits(requires=("logits", "load"))
    beta: float = option(0.5, help="strength of the bias", min=0)
    decay: float = option(0.9, help="decay of the running mean", min=0, max=1)

    @hookimpl
    def moe_bias(self, spec, level):
        return AbsoluteBias(level.size, self.beta, self.decay)


class AbsoluteBias(Bias):
    selection_only, wants_expert_grad = False, True

    def __init__(self, size, beta, decay):
        super().__init__()
        self.beta, self.decay = beta, decay
        self.expert_buffer("s", torch.full((size,), 0.5), new=0.5)

    def forward(self):
        return self.beta * (1 - self.s)

    def after_step(self, step):
        ema_update_(self.s, step.expert_grad, self.decay)
