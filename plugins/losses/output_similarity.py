"""Similarity of what a token's experts answer."""

import attrs
import torch
from torch.nn.functional import normalize

from moe_engine import Traits, at_least_fp32, hookimpl, option


@attrs.define(eq=False)
class OutputSimilarity:
    """The mean of cos(F_i(x), F_j(x))^2 over tokens x and pairs i < j of the experts that x chose.

    0 if all outputs are orthogonal, 1 for clones, whatever their scale. An output of zero counts as
    orthogonal to all. Of each forward `tokens` evenly spaced real tokens are taken, and every expert is
    run on them, which costs as much as E tokens / K more tokens in the batch. Clones sit exactly at the
    maximum, where there is no gradient: a source of noise must part them. Dropout and batch statistics of
    experts that are modules see the extra tokens too.

    Source: this project, after Guo et al., 2025 (orthogonality loss), whose norm is not given.
    """

    traits = Traits(requires=("choices",), balanced=None)
    weight: float = option(0.01, help="coefficient", min=0)
    tokens: int = option(64, help="tokens of a forward on which outputs are compared", min=1)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k < 2:
            return "output_similarity compares the experts of a token, of which top_k=1 leaves one; raise top_k to 2"
        return None

    @hookimpl
    def moe_aux_loss(self, routing, layer):
        at_S = spread(routing.tokens, self.tokens)
        x_SD = routing.tokens.x[at_S]
        x_SD = x_SD.to(next(layer.experts.parameters(), x_SD))  # autocast is off here
        unit_ESO = normalize(at_least_fp32(layer.experts.outputs(x_SD)), dim=-1)
        cos_SEE = torch.einsum("iso,jso->sij", unit_ESO, unit_ESO)
        chosen_SE = routing.chosen()[at_S]
        pair_SEE = (chosen_SE[:, :, None] * chosen_SE[:, None]).triu(1)
        return (pair_SEE * cos_SEE.square()).sum() / pair_SEE.sum().clamp(min=1)


def spread(tokens, count):
    """[S]: the places of `count` evenly spaced real tokens; where there are fewer, all of them, and padding."""
    total = tokens.x.shape[0]
    size = min(count, total)
    real_T = torch.ones(total, device=tokens.x.device) if tokens.mask is None else tokens.mask.float()
    first_T = real_T.argsort(descending=True, stable=True)  # real ones first, in their order
    return first_T[torch.arange(size, device=real_T.device) * tokens.count.clamp(min=size) // max(size, 1)]
