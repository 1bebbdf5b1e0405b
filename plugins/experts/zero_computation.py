import attrs
import torch

from moe_engine import ACTIVATIONS, Experts, grouped_linear, hookimpl, option, own_values, row_counts, uniform, zeros

MLP, ZERO, COPY, CONSTANT = range(4)  # kinds of experts


@attrs.define(eq=False)
class ZeroComputation:
    """Stacked MLPs, and experts without one (MoE++).

    The last experts are, in this order, `zero` with F(x) = 0, `copy` with F(x) = x (LongCat-Flash's zero experts) and
    `constant` with F(x) = a_1 x + a_2 v, a = softmax(x W_a), v learned. They cost no MLP, though each keeps the
    weights of one, unused. A new expert is of its parent's kind, without a parent an MLP.

    Sources: Jin et al., 2024 (MoE++); Meituan, 2025 (LongCat-Flash Technical Report).
    """

    zero: int = option(1, help="number of experts that return 0", min=0)
    copy: int = option(1, help="number of experts that return their input", min=0)
    constant: int = option(1, help="number of experts that mix their input with a learned vector", min=0)

    @hookimpl
    def moe_check(self, setup):
        spec, others = setup.spec, self.zero + self.copy + self.constant
        if others >= spec.experts:
            return f"zero_computation leaves no MLP among {spec.experts} experts; lower zero, copy or constant"
        if spec.dim and spec.out_dim != spec.dim and self.copy + self.constant:
            return f"zero_computation can't copy {spec.dim} numbers to out={spec.out_dim}; set copy=0 and constant=0"
        if silent := setup.others(self, effect="silent_start"):
            return f"{silent[0]} can't silence new experts of zero_computation that copy; choose another initializer"
        return None

    @hookimpl
    def moe_experts(self, spec):
        return MixedExperts(spec, self.zero, self.copy, self.constant)


class MixedExperts(Experts):
    """kind [E]; of MLPs w_in [E, D, W], b_in [E, W], w_out [E, H, out], b_out [E, out]; of constants w_a, v."""

    def __init__(self, spec, zero, copy, constant):
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        wide = 2 if spec.activation == "swiglu" else 1
        ends = {"in": (spec.dim, wide * spec.hidden, "in"), "out": (spec.hidden, spec.out_dim, "output")}
        for end, (before, after, role) in ends.items():
            self.expert_param(f"w_{end}", (spec.experts, before, after), fresh=uniform(before), role=role)
            if spec.bias:
                self.expert_param(f"b_{end}", (spec.experts, after), fresh=uniform(before), role=role)
        if constant:
            self.expert_param("w_a", (spec.experts, spec.dim, 2), fresh=uniform(spec.dim), role="in")
            self.expert_param("v", (spec.experts, spec.out_dim), fresh=zeros, role="output")
        kinds = [MLP] * (spec.experts - zero - copy - constant) + [ZERO] * zero + [COPY] * copy + [CONSTANT] * constant
        self.expert_buffer("kind", torch.tensor(kinds, dtype=torch.float32))  # floats, of which growth has a mean

    def adjust_rows(self, staged, plans):
        if "expert" not in plans:
            return
        plans["expert"].refuse_mixed(self.kind, "kind of expert")
        for position, origin in enumerate(plans["expert"].origins):
            if origin is None:
                staged["kind"][position] = MLP

    def forward(self, x_ND, counts_E):
        kind_N = own_values(self.kind[:, None], counts_E, x_ND.shape[0])  # [N, 1]
        order_N = (kind_N[:, 0] != MLP).to(torch.int8).argsort(stable=True)  # rows of MLPs first, still by expert
        counts = row_counts(counts_E * (self.kind == MLP))
        hidden_NH = self.act(grouped_linear(x_ND[order_N], self.w_in, getattr(self, "b_in", None), counts))
        y_NO = grouped_linear(hidden_NH, self.w_out, getattr(self, "b_out", None), counts)[order_N.argsort()]
        if y_NO.shape == x_ND.shape:
            y_NO = torch.where(kind_N == COPY, x_ND, y_NO)
        if hasattr(self, "v"):
            a_N2 = grouped_linear(x_ND, self.w_a, None, row_counts(counts_E)).softmax(-1)
            constant_NO = a_N2[:, :1] * x_ND + a_N2[:, 1:] * own_values(self.v, counts_E, x_ND.shape[0])
            y_NO = torch.where(kind_N == CONSTANT, constant_NO, y_NO)
        return y_NO
