import attrs
import torch

from moe_engine import NewExpert, hookimpl, option


@attrs.define(eq=False)
class PcaSplit:
    """Split the parent's tokens along their principal direction.

    w' = w + delta u and w <- w - delta u for the router's rows, with u = (v - c o) / s for the parent's tokens x of
    a held-out batch: v their first principal direction, s the standard deviation of (v - c o) x. A router without a
    bias has no threshold; o, the inverse covariance (with a ridge of a thousandth of the mean variance) times the
    mean, replaces it, because o x is the most even over tokens. c is the median of v x / o x if all o x > 0, and so
    half of the tokens have u x > 0. Linear logits of the two then differ by 2 delta u x. The experts start equal, and
    moments are copied. Without a held-out batch, with fewer than four tokens, or with equal ones, u is random.

    Source: this project, after splitting by the principal direction in clustering (Boley, 1998: PDDP).
    """

    delta: float = option(0.5, help="half the pair's difference in logits, in standard deviations", min=1e-6)

    @hookimpl
    def moe_new_expert(self, parent, fresh, roles, generator, inputs):
        if parent is None:
            return NewExpert(fresh)
        steps = {
            name: self.delta * _side(row, inputs, generator)
            for name, row in parent.items()
            if roles[name] == "logit_row"
        }
        return NewExpert(
            {name: row + steps.get(name, 0) for name, row in parent.items()},
            parent_values={name: parent[name] - step for name, step in steps.items()},
            moments="copy",
        )


def _side(row, inputs, generator):
    """u, for a router's row [D], or each of an expert's rows [n, D]."""
    if inputs is None or len(inputs) < 4 or not (inputs - inputs[0]).any():
        drawn = torch.randn(row.shape, generator=generator)
        return (drawn * row.float().std(correction=0)).to(row.dtype)
    x_nD = inputs.double()
    m = x_nD.mean(0)
    spread_DD = (x_nD - m).t() @ (x_nD - m) / len(x_nD)
    v = torch.linalg.eigh(spread_DD).eigenvectors[:, -1]
    ridge_DD = 1e-3 * spread_DD.trace() / len(m) * torch.eye(len(m), dtype=m.dtype)
    o = torch.linalg.solve(spread_DD + ridge_DD, m)
    level = x_nD @ o
    if bool((level > 0).all()):
        v = v - (x_nD @ v / level).quantile(0.5) * o
    return (v / (x_nD @ v).std().clamp(min=1e-12)).to(row.dtype).expand_as(row)
