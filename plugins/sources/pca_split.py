"""New experts that take over one side of their parent's tokens."""

import attrs
import torch

from moe_engine import NewExpert, hookimpl, option


@attrs.define(eq=False)
class PcaSplit:
    """Parent and newcomer share the parent's tokens along their principal direction.

    w' = w + delta u and w <- w - delta u for the router's rows;
    u = (v - c m) / s for the tokens x of a held-out batch that go to the parent: m their mean, v the first
    principal direction of x - m, s the deviation of u x, and c the median of v x / m x where m x > 0, so that
    u x > 0 for half of them without a bias. The two logits differ by 2 delta u x. The experts are equal
    at first, moments are copied. Without a held-out batch, or with fewer than four tokens, v is drawn.

    Source: this project, after splitting by the principal direction in clustering (Boley, 1998: PDDP).
    """

    delta: float = option(0.5, help="half of the pair's difference in logits, in deviations of the tokens", min=1e-6)

    @hookimpl
    def moe_new_expert(self, parent, fresh, roles, generator, inputs):
        if parent is None:
            return NewExpert(fresh)
        steps = {
            name: self.delta * _side(row, inputs, generator)
            for name, row in parent.items()
            if roles[name] == "logit_row" and row.dim() == 1
        }
        return NewExpert(
            {name: row + steps.get(name, 0) for name, row in parent.items()},
            parent_values={name: parent[name] - step for name, step in steps.items()},
            moments="copy",
        )


def _side(row, inputs, generator):
    """u, for a router's row [D]."""
    if inputs is None or len(inputs) < 4 or not inputs.any():
        drawn = torch.randn(row.shape, generator=generator)
        return (drawn * row.float().std(correction=0)).to(row.dtype)
    x_nD = inputs.double()
    m = x_nD.mean(0)
    v = torch.linalg.svd(x_nD - m, full_matrices=False).Vh[0]
    along = x_nD @ m
    if bool((along > 0).all()):
        v = v - (x_nD @ v / along).quantile(0.5) * m
    return (v / (x_nD @ v).std().clamp(min=1e-12)).to(row.dtype)
