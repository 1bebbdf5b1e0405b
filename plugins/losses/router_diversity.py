import attrs
import torch

from moe_engine import Finding, Traits, UsageError, hookimpl, linear_logits, option


@attrs.define(eq=False)
class RouterDiversity:
    """Push the router's weight rows towards orthonormality.

    |R R^T - I| with R the router's rows, one per expert; one term for each set of rows. norm=l1: sum of absolute
    entries (SimBal); norm=frobenius: root of the sum of squares. 0 if the rows are orthonormal, which more experts
    than dimensions can't be. The loss sees no data and hence no load; it also pulls each row to length 1. It
    separates copied rows, as after a growth, at once.

    Sources: Omi et al., 2025 (SimBal); Guo et al., 2024 (DynMoE), for the Frobenius norm.
    """

    traits = Traits(balanced=None)
    weight: float = option(0.1, help="coefficient", min=0)
    norm: str = option("l1", help="norm of the difference", choices=("l1", "frobenius"))

    @hookimpl
    def moe_check(self, setup):
        if 0 < setup.spec.dim < setup.spec.experts:
            why = f"router_diversity can't reach 0: {setup.spec.experts} rows of {setup.spec.dim} values are dependent"
            return Finding("out of reach", 1, why, "use fewer experts or a wider model")
        if copies := setup.others(self, effect="copies_router_row"):
            why = f"router_diversity separates the equal router rows that {copies[0]} creates"
            return Finding("at odds", 1, why, f"remove router_diversity, or replace the initializer {copies[0]}")
        return None

    @hookimpl
    def moe_aux_loss(self, layer):
        axes = {name: axis for name, axis in layer.router.axes.items() if axis.role == "logit_row"}
        if not axes:
            why = "router_diversity needs a router with rows of the role logit_row"
            raise UsageError(f"{why}; choose another router or remove router_diversity", code="no-router-rows")
        return {name: self._distance(getattr(layer.router, name).movedim(axis.axis, 0)) for name, axis in axes.items()}

    def _distance(self, rows_ED):
        gram_EE = linear_logits(rows_ED.flatten(1), rows_ED.flatten(1))
        excess_EE = gram_EE - torch.eye(gram_EE.shape[0], dtype=gram_EE.dtype, device=gram_EE.device)
        return excess_EE.abs().sum() if self.norm == "l1" else torch.linalg.matrix_norm(excess_EE)
