import attrs
import torch

from moe_engine import NewExpert, Traits, hookimpl, option


@attrs.define(eq=False)
class Clone:
    """Copy the parent, with noise on the expert's weights.

    W' = W + noise std(W) N(0, 1) for the expert, w' = w for the router row, so both start with the same tokens and
    the noise separates them. Optimizer moments are copied, so the first step is as large as the parent's.

    Source: Komatsuzaki et al., 2022 (Sparse Upcycling), here for one expert of a sparse layer.
    """

    traits = Traits(effects=("copies_router_row", "copies_expert"))
    noise: float = option(0.01, help="noise relative to each weight tensor's standard deviation", min=0)

    @hookimpl
    def moe_check(self, setup):
        if self.noise == 0 and not setup.others(self, effect="parts_copies"):
            return "clone.noise=0 makes twins with equal gradients that never separate; set it above 0"
        return None

    @hookimpl
    def moe_new_expert(self, parent, fresh, roles, generator):
        if parent is None:
            return NewExpert(fresh)
        return NewExpert(
            {name: row + self._noise(row, roles[name], generator) for name, row in parent.items()}, moments="copy"
        )

    def _noise(self, row, role, generator):
        if role not in ("in", "output") or row.numel() < 2:
            return torch.zeros_like(row)
        return self.noise * row.std() * torch.randn(row.shape, generator=generator).to(row.dtype)
