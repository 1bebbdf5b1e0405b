"""New experts that are copies with some hidden units drawn anew."""

import attrs
import torch

from moe_engine import NewExpert, Traits, UsageError, hookimpl, option


@attrs.define(eq=False)
class PartialReinit:
    """A newcomer is its parent, with the share r of its hidden units redrawn: W'_J ~ N(mean(W_J), std(W_J)).

    J are round(r H) hidden units, at least one, the same ones in every tensor. Router row and moments are copied.
    Source: Nakamura et al., 2025 (Drop-Upcycling), where r = 0.5 is best.
    """

    traits = Traits(effects=("copies_router_row",))

    share: float = option(0.5, help="share of hidden units that are redrawn", min=0.001, max=1)

    @hookimpl
    def moe_new_expert(self, parent, fresh, generator):
        if parent is None or not any(name.startswith("experts.") for name in parent):  # a group's own row
            return NewExpert(fresh) if parent is None else NewExpert(parent, moments="copy")
        if "experts.w_out" not in parent:
            raise UsageError("partial_reinit redraws hidden units of stacked MLPs, and these experts are others")
        rows, hidden = {**parent}, parent["experts.w_out"].shape[0]
        drawn_J = torch.randperm(hidden, generator=generator)[: max(1, round(self.share * hidden))]
        for name, axis in (("experts.w_in", 1), ("experts.b_in", 0), ("experts.w_out", 0)):
            if name in rows:
                parts = range(rows[name].shape[axis] // hidden)  # 2 for swiglu: gate, then up
                units = torch.cat([drawn_J + part * hidden for part in parts])
                rows[name] = _redrawn(rows[name], axis, units, generator)
        return NewExpert(rows, moments="copy")


def _redrawn(row, axis, units, generator):
    old = row.index_select(axis, units).float()
    new = old.mean() + old.std(correction=0) * torch.randn(old.shape, generator=generator)
    return row.index_copy(axis, units, new.to(row.dtype))
