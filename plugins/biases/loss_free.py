import attrs
import torch

from moe_engine import Bias, Finding, Traits, hookimpl, option


@attrs.define(eq=False)
class LossFree:
    """Step the bias by the sign of the load error.

    b_i <- b_i + rate sign(mean_j load_j - load_i) after each optimizer step, then centred; for selection only.
    `rate` is in units of the router's scores: 0.001 suits sigmoid scores, logits need 0.03 to 0.1.

    Sources: Wang et al., 2024 (Auxiliary-Loss-Free Load Balancing); DeepSeek-AI, 2024 (DeepSeek-V3).
    """

    traits = Traits(requires=("logits", "load"), effects=("equal_load",))
    rate: float = option(0.001, help="step size, in units of the router's scores", min=0)

    @hookimpl
    def moe_check(self, setup):
        if rivals := setup.others(self, hook="moe_bias"):
            why = f"{rivals[0]} and loss_free both adjust routing scores and will counteract each other"
            return Finding("two controllers", 1, why, f"remove {rivals[0]} or loss_free")
        if strong := [name for name, weight in setup.balance_losses.items() if weight >= 1e-3]:
            why = f"{strong[0]} adds a balancing gradient, which loss_free is meant to avoid"
            return Finding("two remedies", 1, why, f"remove {strong[0]}, or set its weight below 0.001")
        return None

    @hookimpl
    def moe_bias(self, spec, level):
        return SignBias(level.size, self.rate)


class SignBias(Bias):
    def __init__(self, size, rate):
        super().__init__()
        self.rate = rate
        self.expert_buffer("b", torch.zeros(size), new="parent")

    def forward(self):
        return self.b

    def adjust_rows(self, staged, plans):
        staged["b"] -= staged["b"].mean()

    def after_step(self, step):
        self.b += self.rate * torch.where(step.load.sum() > 0, torch.sign(1 - step.relative(step.load)), 0)
        self.b -= self.b.mean()
