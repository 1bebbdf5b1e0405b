import attrs

from moe_engine import Traits, cv2, hookimpl, option


@attrs.define(eq=False)
class LoadCV2:
    """Load loss: equal smooth loads.

    CV^2(v) = var(v) / mean(v)^2 over experts, v_i the router's smooth estimate of expert i's load. The load itself
    is a count and has no gradient; but a noisy router knows the probability that each token chooses each expert if
    the noise is redrawn, and the sum of these has a gradient. 0 if all are equal, E / K - 1 if K experts get
    everything. v is the mean over processes.

    Source: Shazeer et al., 2017 (Outrageously Large Neural Networks), appendix A.
    """

    traits = Traits(requires=("smooth_load",), balanced=None)  # equal loads do not equalise their estimate
    weight: float = option(0.1, help="coefficient", min=0)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k == setup.spec.experts:
            why = f"load_cv2 has nothing to balance if every token takes all {setup.spec.experts} experts"
            return f"{why}; lower top_k or remove load_cv2"
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        return cv2(routing.smooth_load)
