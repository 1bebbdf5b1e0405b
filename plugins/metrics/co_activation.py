import attrs
import torch

from moe_engine import Traits, hookimpl


@attrs.define(eq=False)
class CoActivation:
    """Which experts are chosen together.

    co_activation [E, E] = N_ij / N_i: of the tokens that chose expert i, the share that also chose j; row i is null
    if no token chose i, and the diagonal is 1. co_activation_max: the largest value off the diagonal, 1 for a pair
    that is always chosen together. Even, independent choices give (K - 1) / (E - 1).

    Source: Muennighoff et al., 2024 (OLMoE), eq. 6.
    """

    traits = Traits(requires=("choices",))

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k == 1:
            return "co_activation has no pairs to count at top_k=1; raise top_k to 2 or remove co_activation"
        return None

    @hookimpl
    def moe_measure(self, routing):
        chosen_TE = routing.chosen()
        return {"pairs": chosen_TE.T @ chosen_TE}

    @hookimpl
    def moe_metrics(self, stats):
        pairs_EE = stats["co_activation.pairs"]
        if not pairs_EE.any():
            return {}
        share_EE = pairs_EE / pairs_EE.diagonal()[:, None]
        others_EE = share_EE.masked_fill(torch.eye(len(share_EE)).bool(), 0)
        return {"co_activation": share_EE, "co_activation_max": others_EE.nan_to_num(0).max()}
