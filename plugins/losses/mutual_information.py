"""Mutual information of tokens and experts."""

import attrs

from moe_engine import Finding, entropy_of, hookimpl, option, shared


@attrs.define(eq=False)
class MutualInformation:
    """-I(t; e) = mean_t H(p_t) - H(P), P = mean_t p_t: sharp for each token, even over all of them.

    -ln E if tokens are sure and the experts even, 0 if all tokens have the same p. H(P) is that of the mean over
    processes; of T tokens it comes out too low by up to (E - 1) / 2T. The paper gives no weight that could
    be taken over: 0.01 is this project's.

    Source: Shen et al., 2023 (ModuleFormer).
    """

    needs = ("probs",)
    balanced = None
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_check(self, setup):
        if "entropy" in setup.plugins:
            why = "mutual_information is the sum of both forms of the loss entropy, so that one of them counts twice"
            return Finding("counted twice", 1, why, "leave mutual_information or entropy out")
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.mean(entropy_of(routing.probs)) - entropy_of(shared(routing.mean(routing.probs)))
