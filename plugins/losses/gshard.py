import attrs

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class GShard:
    """GShard's balance loss, on first choices.

    E sum_i c_i P_i: c_i the share of tokens whose first choice is expert i (a constant), P_i the mean probability of
    i. 1 at balance, E if all tokens put the same expert first. Later choices are ignored; at K = 1 it is switch_aux.
    The paper's own value, mean_i (c_i P_i), is this one divided by E^2.

    Source: Lepikhin et al., 2020 (GShard), algorithm 1.
    """

    traits = Traits(requires=("probs", "load"), balanced=1.0)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        plan = routing.plan
        first_E = routing.by_expert(plan.selected & (plan.rank == 0))
        c_E = first_E / first_E.sum().clamp(min=1)
        return routing.experts * (c_E * routing.mean(routing.probs)).sum()
