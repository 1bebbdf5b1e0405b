"""Banks of experts: stacked MLPs, and any modules in a list."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..contract.parts import Experts, combine, mean_grad, uniform
from ..contract.routing import Spec
from ..processes import world_size
from .activations import ACTIVATIONS
from .fused_cpu import fused_mlp
from .grouped import grouped_linear, row_counts


class StackedMLP(Experts):
    """E two-layer MLPs in stacked weights: act(x W_in + b_in) W_out + b_out.

    w_in [E, D, W] and b_in [E, W], the up projection: W is H, or 2H for swiglu (gate, then up). w_out [E, H, out] and
    b_out [E, out], the down projection. Biases are None unless the spec has them.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.activation = spec.activation
        count, dim, hidden, out = spec.experts, spec.dim, spec.hidden, spec.out_dim
        width = 2 * hidden if spec.activation == "swiglu" else hidden
        self.expert_param("w_in", (count, dim, width), fresh=uniform(dim), role="in")
        self.expert_param("w_out", (count, hidden, out), fresh=uniform(hidden), role="output")
        self.b_in: Tensor | None
        self.b_out: Tensor | None
        if spec.bias:
            self.expert_param("b_in", (count, width), fresh=uniform(dim), role="in")
            self.expert_param("b_out", (count, out), fresh=uniform(hidden), role="output")
        else:
            self.b_in = self.b_out = None

    w_in: Tensor
    w_out: Tensor

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        return self._grouped_mlp(x_ND, row_counts(counts_E), self.w_in, self.b_in, self.w_out, self.b_out)

    def _grouped_mlp(
        self,
        x_ND: Tensor,
        counts: list[int] | Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
    ) -> Tensor:
        """[N, out]: each row through its expert; autograd can differentiate it any number of times."""
        return grouped_linear(self.activate(grouped_linear(x_ND, w_in, b_in, counts)), w_out, b_out, counts)

    def activate(self, a_NW: Tensor) -> Tensor:
        """[N, H]: the hidden units, of what enters them [N, W]. A subclass may have another activation."""
        return ACTIVATIONS[self.activation](a_NW)

    def combined(self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, counts_E: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x_TD.device.type != "cpu" or self._must_call_forward():
            return super().combined(x_TD, token_N, weight_N, counts_E)
        counts = counts_E.tolist()
        if (rows := sum(counts)) < len(token_N):
            token_N, weight_N = token_N[:rows], weight_N[:rows]

        def reference(x_TD: Tensor, weight_N: Tensor, *weights: Tensor) -> Tensor:
            out_NO = self._grouped_mlp(x_TD.index_select(0, token_N), counts, *weights)
            return combine(out_NO, token_N, weight_N, len(x_TD))

        weights = (self.w_in, self.b_in, self.w_out, self.b_out)
        return fused_mlp(x_TD, token_N, weight_N, counts, self.activation, weights, reference)

    def _must_call_forward(self) -> bool:
        """True if a method that the fused kernel would bypass is overridden, or the bank has hooks."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        plain = StackedMLP.forward, StackedMLP.activate
        return tuple(getattr(one, "__func__", None) for one in (self.forward, self.activate)) != plain or any(hooks)

    def outputs(self, x_SD: Tensor) -> Tensor:
        hidden_ESH = x_SD @ self.w_in if self.b_in is None else x_SD @ self.w_in + self.b_in[:, None]
        out_ESO = self.activate(hidden_ESH) @ self.w_out
        return out_ESO if self.b_out is None else out_ESO + self.b_out[:, None]


class ModuleBank(Experts):
    """Any modules as experts: each maps its rows [n, D] to [n, out], and is not called without rows.

    Under torch.compile, reading the number of rows breaks the graph: fullgraph=True needs a StackedMLP.
    """

    def __init__(self, modules: Sequence[nn.Module], out: int) -> None:
        super().__init__()
        self.bank = nn.ModuleList(modules)
        self.out = out

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        rest = x_ND.shape[0] - sum(counts)
        *rows, _ = x_ND.split([*counts, rest])
        parts = [expert(rows_nD) for expert, rows_nD in zip(self.bank, rows, strict=True) if rows_nD.shape[0]]
        dtype = parts[0].dtype if parts else x_ND.dtype
        out_NO = torch.cat([*parts, torch.zeros(rest, self.out, dtype=dtype, device=x_ND.device)])
        return out_NO + self._idle(counts) if world_size() > 1 and torch.is_grad_enabled() else out_NO

    def _idle(self, counts: list[int]) -> Tensor:
        """0, attached to the parameters of experts without rows: DistributedDataParallel waits for their gradients."""
        idle = [expert for expert, count in zip(self.bank, counts, strict=True) if not count]
        return sum((p.flatten()[:0].sum() for expert in idle for p in expert.parameters()), torch.zeros(()))

    def outputs(self, x_SD: Tensor) -> Tensor:
        return torch.stack([expert(x_SD) for expert in self.bank])

    def expert_grad(self) -> Tensor:
        return torch.stack([_mean_of([mean_grad(p) for p in expert.parameters()]) for expert in self.bank])


def _mean_of(means: list[Tensor]) -> Tensor:
    """The mean of scalars; 0 if there are none, for example for a module without parameters."""
    return torch.stack(means).mean() if means else torch.zeros(())
