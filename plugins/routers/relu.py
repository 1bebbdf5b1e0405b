import attrs
import torch

from moe_engine import LinearRouter, Part, Traits, assign_where, hookimpl, option


@attrs.define(eq=False)
class ReLU:
    """Every expert with a positive logit (ReMoE).

    g = ReLU(x W): no top-k, and differentiable wherever g > 0. At initialisation about half the experts are active,
    so the first steps are expensive. An expert that is inactive for all tokens no longer gets a gradient, and
    tokens spread evenly around zero keep half the experts active, whatever the coefficient.

    Loss: m E / (K T^2) sum_i load_i sum_t g_ti, an L1 norm of the gates weighted by load. After each step m <- m
    rate if tokens have more than K = top_k experts on average, else m / rate; m starts at 1 and stays in [1e-9,
    1e9], so `weight` is the initial coefficient.

    Source: Wang et al., 2024 (ReMoE), where all layers share one coefficient; here each layer has its own.
    """

    traits = Traits(provides=("load", "choices"))
    weight: float = option(1e-8, help="initial coefficient of the L1 loss", min=0)
    rate: float = option(1.2, help="factor by which each step changes the coefficient", min=1)

    @hookimpl
    def moe_router(self, spec):
        return ReLURouter(spec)

    @hookimpl
    def moe_state(self, spec):
        return Multiplier(spec.top_k, self.rate)

    @hookimpl
    def moe_measure(self, routing):
        return {"tokens": routing.tokens.count.view(1)}

    @hookimpl
    def moe_aux_loss(self, routing, state):
        mean_gate_E = routing.mean(routing.gates())
        load_E = routing.load / routing.tokens.count.clamp(min=1)
        return state.m * routing.experts / routing.top_k * (load_E * mean_gate_E).sum()


class ReLURouter(LinearRouter):
    keeps_function = ("silent_start",)

    def select(self, tokens, levels):
        (level,) = levels
        gates_TE = torch.relu(level.biased)
        return None, assign_where(gates_TE, gates_TE > 0, tokens)


class Multiplier(Part):
    def __init__(self, target, rate):
        super().__init__()
        self.target, self.rate = target, rate
        self.register_buffer("m", torch.ones(()))

    def after_step(self, step):
        tokens = step.own["tokens"].sum()
        factor = torch.where(step.load.sum() > self.target * tokens, self.rate, 1 / self.rate)
        self.m *= torch.where(tokens > 0, factor, 1)
        self.m.clamp_(1e-9, 1e9)
