import attrs
import torch

from moe_engine import Finding, Traits, cv2, hookimpl, option


@attrs.define(eq=False)
class ImportanceCV2:
    """Importance loss: equal sums of gates over experts.

    CV^2(v) = var(v) / mean(v)^2 over experts (population variance). of=gates: v_i = sum_t g_ti over the tokens that
    chose expert i, before capacity drops any (Shazeer et al.). of=probs: v_i = sum_t p_ti over all tokens (V-MoE),
    which is gate_variance (E - 1) / E. 0 at balance, E / K - 1 if K experts share everything. v is the mean over
    processes.

    Sources: Shazeer et al., 2017 (Outrageously Large Neural Networks), eq. 6-7; Riquelme et al., 2021 (V-MoE).
    """

    traits = Traits(requires=("probs", "load"), balanced=0.0)
    weight: float = option(0.1, help="coefficient", min=0)
    of: str = option("gates", help="sum the gates after top-k, or all probabilities", choices=("gates", "probs"))

    @hookimpl
    def moe_check(self, setup):
        if self.of == "probs" and (twice := setup.others(self, effect="mean_probs_cv2")):
            why = f"importance_cv2.of=probs and {twice[0]} both penalise the variance of the mean probabilities"
            return Finding("counted twice", 1, why, f"remove {twice[0]} or set importance_cv2.of=gates")
        return None

    @hookimpl
    def moe_aux_loss(self, routing):
        if self.of == "probs":
            return cv2(routing.mean(routing.probs))
        plan = routing.plan
        return cv2(routing.by_expert(torch.where(plan.selected, plan.weight, 0)))
