"""ReLU routing."""

import attrs
import torch

from moe_engine import LinearRouter, Part, Traits, assign_where, hookimpl, option


@attrs.define(eq=False)
class ReLU:
    """A token goes to every expert with a positive logit: g = ReLU(x W). No top-k, differentiable where s > 0.

    Loss: m E / (K T^2) sum_i load_i sum_t g_ti, an L1 norm of the gates weighted by load. After each step
    m <- m rate where a token has more than top_k = K experts on average, else m / rate, from 1 on and between
    1e-9 and 1e9; so `weight` is the coefficient at the start. At birth about half of all experts fire: the
    first steps are dear. An expert that fires for no token gets no gradient any more; and tokens that lie
    evenly around zero keep half of the experts firing, whatever the coefficient.

    Source: Wang et al., 2024 (ReMoE); the coefficient is each layer's own here, one of all layers there.
    """

    traits = Traits(provides=("load", "choices"))
    weight: float = option(1e-8, help="coefficient of the L1 loss at the start", min=0)
    rate: float = option(1.2, help="factor by which a step moves the coefficient", min=1)

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
        up = torch.where(step.load.sum() > self.target * tokens, self.rate, 1 / self.rate)
        self.m *= torch.where(tokens > 0, up, 1)
        self.m.clamp_(1e-9, 1e9)
