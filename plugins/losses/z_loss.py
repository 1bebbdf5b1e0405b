import attrs
import torch

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class ZLoss:
    """Keep the router's logits small (ST-MoE).

    mean_t (logsumexp_i s_ti)^2 of the raw logits s, one term per level of the router. It keeps the logits near zero;
    softmax itself ignores a common offset. (ln E)^2 for zero logits; padding is ignored.

    Source: Zoph et al., 2022 (ST-MoE), eq. 5.
    """

    traits = Traits(requires=("logits",), balanced=None)
    weight: float = option(0.001, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        return {level.name: routing.mean(torch.logsumexp(level.logits, -1).square()) for level in routing.levels}
