import attrs
import torch

from moe_engine import NewExpert, hookimpl, option


@attrs.define(eq=False)
class Split:
    """Move parent and child apart in opposite directions.

    W' = W + d and W <- W - d with d = delta std(W) N(0, 1), for router rows too, so the two share the parent's
    tokens. Opposite noise cancels to first order where both are chosen. Optimizer moments are copied; the parent
    keeps its own.

    Source: Chen et al., 2016 (Net2Net); the symmetry breaking by opposite noise is this project's.
    """

    delta: float = option(0.05, help="step relative to each tensor's standard deviation", min=1e-6)

    @hookimpl
    def moe_new_expert(self, parent, fresh, roles, generator):
        if parent is None:
            return NewExpert(fresh)
        step = {name: self._step(row, roles[name], generator) for name, row in parent.items()}
        return NewExpert(
            {name: row + step[name] for name, row in parent.items()},
            parent_values={name: row - step[name] for name, row in parent.items()},
            moments="copy",
        )

    def _step(self, row, role, generator):
        if role not in ("in", "output", "logit_row") or row.numel() < 2:
            return torch.zeros_like(row)
        return self.delta * row.std() * torch.randn(row.shape, generator=generator).to(row.dtype)
