import attrs
import torch

from moe_engine import LinearRouter, assign, hookimpl, option


@attrs.define(eq=False)
class SparseMixer:
    """SparseMixer: each expert drawn among those near the best.

    For each choice s in turn, among the experts not chosen yet: those with (max s - s) / max(|s|, max s) <= 2 jitter
    are left. In evaluation the best of them is chosen, in training one is drawn by p, their softmax; the gate is p. In
    training three of four gates that are not the best's are divided by 3, and gradients are those of p (Heun's method).

    Sources: Liu et al., 2023 (Sparse Backpropagation for MoE Training); Abdin et al., 2024 (Phi-3.5-MoE).
    """

    jitter: float = option(0.01, help="half of the relative distance from the best score that still competes", min=0)

    @hookimpl
    def moe_router(self, spec):
        return SparseMixerRouter(spec, self.jitter)


class SparseMixerRouter(LinearRouter):
    def __init__(self, spec, jitter):
        super().__init__(spec)
        self.jitter = jitter

    def select(self, tokens, levels):
        (level,) = levels
        by_TE = left_TE = level.select_by(level.biased)
        gates, experts = [], []
        for _ in range(self.top_k):
            best_T1 = left_TE.argmax(-1, keepdim=True)
            top_T1 = left_TE.gather(-1, best_T1)
            far_TE = (top_T1 - left_TE) / by_TE.abs().maximum(top_T1) > 2 * self.jitter
            p_TE = level.biased.masked_fill(far_TE, -torch.inf).softmax(-1)
            expert_T1 = left_TE.masked_fill(far_TE, -torch.inf).softmax(-1).multinomial(1) if self.training else best_T1
            gates.append(self.gate(p_TE.gather(-1, expert_T1), expert_T1 == best_T1))
            experts.append(expert_T1)
            left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
        gate_TK, order_TK = torch.cat(gates, -1).sort(dim=-1, descending=True, stable=True)
        return level.biased.softmax(-1), assign(gate_TK, torch.cat(experts, -1).gather(-1, order_TK), tokens)

    def gate(self, p_T1, best_T1):
        """In training the midpoint rule of Heun's method; its gradient is that of p."""
        if not self.training:
            return p_T1
        whole_T1 = best_T1 | (torch.rand_like(p_T1) > 0.75)
        return p_T1 + torch.where(whole_T1, 0.0, -2 / 3) * p_T1.detach()
