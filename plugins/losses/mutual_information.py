"""Mutual information of tokens and experts."""

import attrs

from moe_engine import Finding, Traits, entropy_of, hookimpl, mean_over_ranks, option


@attrs.define(eq=False)
class MutualInformation:
    """-I(t; e) = mean_t H(p_t) - H(P), P = mean_t p_t: sharp for each token, even over all of them.

    -ln E if tokens are sure and the experts even, 0 if all tokens have the same p. H(P) is that of the mean over
    processes; of T tokens it comes out too low by up to (E - 1) / 2T. The paper gives no weight that could
    be taken over: 0.01 is this project's.

    Source: Shen et al., 2023 (ModuleFormer).
    """

    traits = Traits(requires=("probs",), balanced=None)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_check(self, setup):
        if twice := setup.others(self, effect="token_entropy"):
            why = f"mutual_information already contains {twice[0]}, an entropy of the choice, so it counts twice"
            return Finding("counted twice", 1, why, f"remove mutual_information or {twice[0]}")
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.mean(entropy_of(routing.probs)) - entropy_of(mean_over_ranks(routing.mean(routing.probs)))
