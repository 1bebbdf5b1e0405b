"""Orthonormal rows of the router."""

import attrs
import torch

from moe_engine import Finding, Traits, UsageError, hookimpl, linear_logits, option


@attrs.define(eq=False)
class RouterDiversity:
    """|R R^T - I|, R the router's rows, one an expert: 0 if they are orthonormal. A term for each set of rows.

    l1: sum of absolute entries (SimBal). frobenius: root of the sum of squares. It sees no data, so it knows
    nothing of the load; it also draws each row to length 1. More experts than dimensions can't be
    orthonormal. Copied rows, as after a growth, are its worst case: it parts them at once.

    Sources: Omi et al., 2025 (SimBal); Guo et al., 2024 (DynMoE), for the Frobenius norm.
    """

    traits = Traits(balanced=None)
    weight: float = option(0.1, help="coefficient", min=0)
    norm: str = option("l1", help="norm of the difference", choices=("l1", "frobenius"))

    @hookimpl
    def moe_check(self, setup):
        if 0 < setup.spec.dim < setup.spec.experts:
            why = f"router_diversity can't reach 0: {setup.spec.experts} rows of {setup.spec.dim} can't be orthogonal"
            return Finding("out of reach", 1, why, "use fewer experts, or a wider model")
        if copies := setup.others(self, effect="copies_router_row"):
            why = f"router_diversity separates the equal router rows that {copies[0]} creates, whatever the growth kept"
            return Finding(
                "at odds", 1, why, f"remove router_diversity, or choose another initializer than {copies[0]}"
            )
        return None

    @hookimpl
    def moe_aux_loss(self, layer):
        axes = {name: axis for name, axis in layer.router.axes.items() if axis.role == "logit_row"}
        if not axes:
            raise UsageError(
                "router_diversity needs rows of the role logit_row; choose another router, or leave it away"
            )
        return {name: self._distance(getattr(layer.router, name).movedim(axis.axis, 0)) for name, axis in axes.items()}

    def _distance(self, rows_ED):
        gram_EE = linear_logits(rows_ED.flatten(1), rows_ED.flatten(1))
        away_EE = gram_EE - torch.eye(gram_EE.shape[0], dtype=gram_EE.dtype, device=gram_EE.device)
        return away_EE.abs().sum() if self.norm == "l1" else torch.linalg.matrix_norm(away_EE)
