"""The load-balancing loss of GShard."""

import attrs

from moe_engine import Traits, count_by, hookimpl, option


@attrs.define(eq=False)
class GShard:
    """E sum_i c_i P_i: c_i the share of tokens whose first choice is expert i (a constant), P_i its mean probability.

    1 at balance, E if all tokens put the same expert first. Second and later choices are not looked at;
    at K = 1 it is switch_aux. The paper's own formula, mean_i (c_i P_i), is this one over E^2.

    Source: Lepikhin et al., 2020, algorithm 1.
    """

    traits = Traits(requires=("probs", "load"), balanced=1.0)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        plan = routing.plan
        first_E = count_by(plan.expert, plan.selected & (plan.rank == 0), routing.experts)
        c_E = first_E / first_E.sum().clamp(min=1)
        return routing.experts * (c_E * routing.mean(routing.probs)).sum()
