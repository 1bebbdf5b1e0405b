import attrs
import torch

from moe_engine import Traits, hookimpl, option


@attrs.define(eq=False)
class SequenceAux:
    """Switch's balance loss within each sequence (DeepSeek-V3).

    mean over sequences of E sum_i f_i P_i, over each sequence's real tokens: f_i expert i's share of the top-K of
    the scores without selection biases (a constant), P_i its mean probability. 1 at balance. It complements a bias
    such as loss_free, which it must not see. [B, S, D] holds B sequences, [T, D] is one. It works against
    specialisation by domain, hence the small weight.

    Source: DeepSeek-AI, 2024 (DeepSeek-V3 Technical Report), eq. 17-20.
    """

    traits = Traits(requires=("probs", "load", "top_k"), balanced=1.0)
    weight: float = option(0.0001, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        p_TE = routing.probs
        chosen_TE = torch.zeros_like(p_TE).scatter(1, _unbiased(routing).topk(routing.top_k, dim=-1).indices, 1.0)
        ones_T1 = torch.ones_like(p_TE[:, :1])
        length_B1, chosen_BE, mass_BE = (
            routing.per_sequence(routing.tokens.real(values)).sum(1) for values in (ones_T1, chosen_TE, p_TE)
        )
        f_BE = chosen_BE / (routing.top_k * length_B1).clamp(min=1)
        P_BE = mass_BE / length_B1.clamp(min=1)
        sequences = routing.total((length_B1 > 0).sum())
        return routing.experts * routing.total((f_BE * P_BE).sum()) / sequences.clamp(min=1)


def _unbiased(routing):
    """What the router took the top of, free of selection biases; over several levels, the probabilities."""
    *coarser, level = routing.levels
    return level.part_ties(routing.probs if coarser or level.scores is None else level.scores)
