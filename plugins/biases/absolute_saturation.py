"""Saturation as it was published."""

import attrs
import torch

from moe_engine import Bias, Traits, ema_update_, hookimpl, option


@attrs.define(eq=False)
class AbsoluteSaturation:
    """z = logits + beta (1 - s), in gates and selection; s <- decay s + (1 - decay) m, s = 0.5 at birth.

    m_i is the mean |gradient| of expert i's weights, as large as it is. Kept for study: with gradients near 1e-4, s
    is near 0 for all, so that all get the same bias, which does nothing; `saturation` takes shares instead.

    Source: kennycason/srnn, 2025.
    """

    traits = Traits(requires=("logits", "load"))
    beta: float = option(0.5, help="strength", min=0)
    decay: float = option(0.9, help="memory of the running mean", min=0, max=1)

    @hookimpl
    def moe_bias(self, spec, level):
        return AbsoluteBias(level.size, self.beta, self.decay)


class AbsoluteBias(Bias):
    selection_only = False
    wants_expert_grad = True

    def __init__(self, size, beta, decay):
        super().__init__()
        self.beta, self.decay = beta, decay
        self.expert_buffer("s", torch.full((size,), 0.5), new=0.5)

    def forward(self):
        return self.beta * (1 - self.s)

    def after_step(self, step):
        ema_update_(self.s, step.expert_grad, self.decay)
