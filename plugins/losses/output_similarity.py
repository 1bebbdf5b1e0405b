import attrs
import torch
from torch.nn.functional import normalize

from moe_engine import Traits, at_least_fp32, hookimpl, option


@attrs.define(eq=False)
class OutputSimilarity:
    """Make the outputs of a token's experts orthogonal.

    mean of cos(F_i(x), F_j(x))^2 over tokens x and pairs i < j of the experts that x chose: 0 if all outputs are
    orthogonal, 1 for clones, whatever their scale. An output of zero counts as orthogonal. Each forward runs every
    expert on `tokens` evenly spaced real tokens, at the cost of E `tokens` / K more tokens in the batch; dropout and
    batch statistics of module experts see them too. Exact clones are at the maximum, where the gradient is 0, so
    noise must separate them first.

    Source: this project, after Guo et al., 2025 (orthogonality loss), whose norm is not given.
    """

    traits = Traits(requires=("choices",), balanced=None, per_rank=True)
    weight: float = option(0.01, help="coefficient", min=0)
    tokens: int = option(64, help="tokens per forward on which outputs are compared", min=1)

    @hookimpl
    def moe_check(self, setup):
        if setup.spec.top_k < 2:
            return "output_similarity compares the experts of a token, which top_k=1 leaves with one; raise top_k to 2"
        return None

    @hookimpl
    def moe_aux_loss(self, routing, layer):
        sample_S = spread(routing.tokens, self.tokens)
        x_SD = routing.tokens.x[sample_S]
        x_SD = x_SD.to(next(layer.experts.parameters(), x_SD).dtype)  # autocast is off here
        unit_ESO = normalize(at_least_fp32(layer.experts.outputs(x_SD)), dim=-1)
        cos_SEE = torch.einsum("iso,jso->sij", unit_ESO, unit_ESO)
        chosen_SE = routing.chosen()[sample_S]
        pair_SEE = (chosen_SE[:, :, None] * chosen_SE[:, None]).triu(1)
        cos2 = routing.total((pair_SEE * cos_SEE.square()).sum())
        return cos2 / routing.total(pair_SEE.sum()).clamp(min=1)


def spread(tokens, count):
    """[S]: indices of `count` evenly spaced real tokens; with fewer real tokens, all of them and some padding."""
    total = tokens.x.shape[0]
    size = min(count, total)
    real_T = torch.ones(total, device=tokens.x.device) if tokens.mask is None else tokens.mask.float()
    order_T = real_T.argsort(descending=True, stable=True)  # real tokens first, in order
    return order_T[torch.arange(size, device=real_T.device) * real_T.sum().long().clamp(min=size) // max(size, 1)]
