import attrs

from moe_engine import Traits, entropy_of, hookimpl, option


@attrs.define(eq=False)
class Entropy:
    """Entropy of each token's choice, or of the batch's.

    token_min: +mean_t H(p_t), which sharpens each token's choice: ln E for uniform probabilities, 0 for certain ones.
    A router that takes experts up to a share of the mass needs it; otherwise it takes all of them. batch_max:
    -H(mean_t p_t), which spreads the batch over all experts: -ln E at balance, 0 at collapse; the mean is over
    processes too. The sum of the two is mutual_information.

    Sources: Huang et al., 2024 (Harder Tasks Need More Experts); Csordás et al., 2023 (sigma-MoE).
    """

    traits = Traits(requires=("probs",), balanced=None, effects=("token_entropy",))
    weight: float = option(0.0001, help="coefficient", min=0)
    form: str = option("token_min", help="sharpen tokens, or spread the batch", choices=("token_min", "batch_max"))

    @hookimpl
    def moe_aux_loss(self, routing):
        if self.form == "token_min":
            return routing.mean(entropy_of(routing.probs))
        return -entropy_of(routing.mean(routing.probs))
