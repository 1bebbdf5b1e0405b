import attrs

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class GateVariance:
    """Variance of the mean probabilities over experts.

    var_i(E P_i), unbiased, with P_i the mean probability of expert i over the tokens of all processes. It equals
    CV^2(P) E / (E - 1): 0 at balance, E if one expert has all the mass.

    Source: kennycason/srnn, 2025.
    """

    traits = Traits(requires=("probs", "load"), balanced=0.0, effects=("mean_probs_cv2",))
    weight: float = option(0.1, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        scaled_E = routing.experts * routing.mean(routing.probs)
        return (scaled_E - scaled_E.mean()).square().sum() / max(routing.experts - 1, 1)
