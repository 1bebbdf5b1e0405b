import attrs

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class SwitchAux:
    """Balance loss of the Switch Transformer.

    E sum_i f_i P_i: f_i expert i's share of the assignments (a constant), P_i its mean probability. 1 at balance, E
    / K if all tokens go to the same K experts. f counts assignments before capacity drops any and is divided by K,
    so the value does not depend on K (transformers' Mixtral does not divide: multiply its coefficient by K to get
    this one's).

    Source: Fedus et al., 2021 (Switch Transformers), eq. 4-6.
    """

    traits = Traits(requires=("probs", "load"), balanced=1.0)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        f_E = routing.load / routing.load.sum().clamp(min=1)
        return routing.experts * (f_E * routing.mean(routing.probs)).sum()
