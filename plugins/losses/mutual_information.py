import attrs

from moe_engine import Finding, Traits, entropy_of, hookimpl, option


@attrs.define(eq=False)
class MutualInformation:
    """Sharp choices per token, spread over all experts.

    -I(t; e) = mean_t H(p_t) - H(P), P = mean_t p_t: -ln E if tokens are certain and the experts evenly used, 0 if
    all tokens have the same p. P is the mean over processes; for T tokens, H(P) is too low by up to (E - 1) / 2T. The
    default weight is this project's, as the paper gives none that transfers.

    Source: Shen et al., 2023 (ModuleFormer).
    """

    traits = Traits(requires=("probs",), balanced=None)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_check(self, setup):
        if twice := setup.others(self, effect="token_entropy"):
            why = f"mutual_information already contains {twice[0]}, an entropy of the choice, which now counts twice"
            return Finding("counted twice", 1, why, f"remove mutual_information or {twice[0]}")
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.mean(entropy_of(routing.probs)) - entropy_of(routing.mean(routing.probs))
