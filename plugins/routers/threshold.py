import attrs
import torch

from moe_engine import LinearRouter, Traits, assign_where, hookimpl, option, zeros


@attrs.define(eq=False)
class Threshold:
    """Every expert above its learned threshold (DynMoE).

    S = {i : sigmoid(tau cos(x, w_i)) > sigmoid(tau G_i)}, G learned and 0 at first; gates are 1 / |S|, with a
    straight-through gradient to ReLU(score - threshold) of the experts in S. A token that exceeds no threshold gets
    no expert in training and its best one in evaluation. The number of experts does not depend on a token's length.
    top_k only scales the layer's capacity.

    Source: Guo et al., 2024 (Dynamic Mixture of Experts).
    """

    traits = Traits(provides=("load", "choices"))
    tau: float = option(1.0, help="sharpness of the scores", min=1e-3, max=100)

    @hookimpl
    def moe_router(self, spec):
        return ThresholdRouter(spec, self.tau)


class ThresholdRouter(LinearRouter):
    def __init__(self, spec, tau):
        super().__init__(spec)
        self.tau = tau
        self.expert_param("G", (spec.experts,), fresh=zeros, role="logit_bias")

    def score(self, tokens):
        (dot_TE,) = super().score(tokens)
        length_T1 = tokens.x.to(dot_TE.dtype).norm(dim=-1, keepdim=True)
        length_E = self.weight.to(dot_TE.dtype).norm(dim=-1)
        return (self.tau * dot_TE / (length_T1 * length_E).clamp(min=1e-12),)

    def select(self, tokens, levels):
        (level,) = levels
        edge_E = self.tau * self.G.to(level.biased.dtype)
        over_TE = torch.relu(level.biased.sigmoid() - edge_E.sigmoid())
        chosen_TE = level.biased > edge_E  # not by sigmoids, which tie once they round to 1
        if not self.training:
            best_T1 = level.select_by(level.biased - edge_E).argmax(-1, keepdim=True)
            best_TE = torch.zeros_like(chosen_TE).scatter(-1, best_T1, True)
            chosen_TE = chosen_TE | (best_TE & ~chosen_TE.any(-1, keepdim=True))
        straight_TE = chosen_TE + over_TE - over_TE.detach()
        return None, assign_where(straight_TE / chosen_TE.sum(-1, keepdim=True).clamp(min=1), chosen_TE, tokens)
