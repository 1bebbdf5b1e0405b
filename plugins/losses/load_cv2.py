"""The load loss: equal smooth loads."""

import attrs

from moe_engine import Traits, cv2, hookimpl, mean_over_ranks, option


@attrs.define(eq=False)
class LoadCV2:
    """CV^2(v) = var(v) / mean(v)^2 over experts, v_i the router's smooth estimate of expert i's load.

    The load itself is a count and has no gradient; a noisy router knows how likely each token is to
    choose each expert if its noise is drawn again, and the sum of that has one. 0 if all are equal, E / K - 1 if K
    experts get everything. v is the mean over processes.

    Source: Shazeer et al., 2017, appendix A.
    """

    traits = Traits(requires=("smooth_load",), balanced=None)  # equal loads do not equalise their estimate
    weight: float = option(0.1, help="coefficient", min=0)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k == setup.spec.experts:
            return (
                f"load_cv2 has nothing to balance where every token takes all {setup.spec.experts} experts; "
                "lower top_k, or leave load_cv2 out"
            )
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        return cv2(mean_over_ranks(routing.smooth_load))
