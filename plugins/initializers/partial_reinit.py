import attrs
import torch

from moe_engine import NewExpert, Traits, UsageError, hookimpl, option


@attrs.define(eq=False)
class PartialReinit:
    """Copy the parent with some hidden units redrawn.

    W'_J ~ N(mean(W_J), std(W_J)) for a random set J of round(r H) hidden units, at least one, the same in every
    tensor; r is `share`. Router row and moments are copied.

    Source: Nakamura et al., 2025 (Drop-Upcycling), where r = 0.5 is best.
    """

    traits = Traits(effects=("copies_router_row",))
    share: float = option(0.5, help="share of hidden units that are redrawn", min=0.001, max=1)

    @hookimpl
    def moe_new_expert(self, parent, fresh, generator):
        if parent is None:
            return NewExpert(fresh)
        if not any(name.startswith("experts.") for name in parent):
            return NewExpert(parent, moments="copy")  # the row of a group
        if "experts.w_out" not in parent:
            why = "partial_reinit redraws hidden units of stacked MLPs, which these experts are not"
            raise UsageError(f"{why}; choose another initializer", code="unsupported-experts")
        rows, hidden = {**parent}, parent["experts.w_out"].shape[0]
        drawn_J = torch.randperm(hidden, generator=generator)[: max(1, round(self.share * hidden))]
        for name, axis in (("experts.w_in", 1), ("experts.b_in", 0), ("experts.w_out", 0)):
            if name in rows:
                parts = rows[name].shape[axis] // hidden  # 2 for swiglu: gate, then up
                units = torch.cat([drawn_J + part * hidden for part in range(parts)])
                rows[name] = _redrawn(rows[name], axis, units, generator)
        return NewExpert(rows, moments="copy")


def _redrawn(row, axis, units, generator):
    old = row.index_select(axis, units).float()
    new = old.mean() + old.std(correction=0) * torch.randn(old.shape, generator=generator)
    return row.index_copy(axis, units, new.to(row.dtype))
