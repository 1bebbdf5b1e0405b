import attrs
import torch
from torch.nn.functional import softplus

from moe_engine import LinearRouter, Traits, assign, hookimpl, linear_logits, option, zeros


@attrs.define(eq=False)
class NoisyTopK:
    """Top-k of logits with learned Gaussian noise.

    H = x W + z (softplus(x V) + floor) with z ~ N(0, 1), in training only; S = top-K of H; gates g = softmax(H_S).
    At K = 1 the gate is the softmax over all experts, because a softmax over one is constant. W and V start at 0, so
    all experts start equally likely.

    chances: P_i = Phi((x W_i - H_(K without i)) / deviation_i) is the probability that a token chooses expert i if
    only i's noise is redrawn; the threshold is the K-th largest of H without i, so K < E. Its sum over tokens is the
    smooth load.

    Source: Shazeer et al., 2017 (Outrageously Large Neural Networks), section 2.1 and appendix A; the floor is
    tensor2tensor's.
    """

    traits = Traits(provides=("logits", "probs", "load", "top_k", "choices", "smooth_load"))
    noise_floor: float = option(0.01, help="smallest standard deviation of the noise", min=1e-6)

    @hookimpl
    def moe_router(self, spec):
        return NoisyTopKRouter(spec, self.noise_floor)


class NoisyTopKRouter(LinearRouter):
    def __init__(self, spec, noise_floor):
        super().__init__(spec, fresh=zeros)
        self.noise_floor = noise_floor
        self.expert_param("noise_weight", (spec.experts, spec.dim), fresh=zeros, role="state")

    def select(self, tokens, levels):
        (level,) = levels
        clean_TE = level.biased
        deviation_TE = softplus(linear_logits(tokens.x, self.noise_weight)) + self.noise_floor
        noisy_TE = clean_TE + deviation_TE * torch.randn_like(clean_TE) if self.training else clean_TE
        expert_TK = level.select_by(noisy_TE).topk(self.top_k, dim=-1).indices
        gate_TK = noisy_TE.gather(-1, expert_TK).softmax(-1)
        if self.top_k == 1:
            gate_TK = noisy_TE.softmax(-1).gather(-1, expert_TK)

        def chances():
            shift_E = 0 if level.bias is None else level.bias
            edge_TK1 = (noisy_TE + shift_E).topk(self.top_k + 1, dim=-1).values
            inside_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(-1, expert_TK, True)
            threshold_TE = torch.where(inside_TE, edge_TK1[:, -1:], edge_TK1[:, -2:-1])
            return torch.special.ndtr((clean_TE + shift_E - threshold_TE) / deviation_TE)

        return clean_TE.softmax(-1), assign(gate_TK, expert_TK, tokens, chances)
