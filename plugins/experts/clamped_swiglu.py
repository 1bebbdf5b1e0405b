import attrs

from moe_engine import Experts, grouped_linear, hookimpl, option, row_counts, uniform


@attrs.define(eq=False)
class ClampedSwiGLU:
    """Stacked MLPs with a clamped SwiGLU (gpt-oss).

    g, u = x W_in + b_in, halved; g = min(g, limit), u = clamp(u, -limit, limit); y = (u + beta) g sigmoid(alpha g)
    W_out + b_out, with biases where the layer has them. No hidden unit grows without bound, which low precision could
    not hold. The layer's activation is ignored, except by shared experts. DeepSeek-V4 uses limit 10, alpha 1, beta 0.

    Source: OpenAI, 2025 (gpt-oss-120b & gpt-oss-20b Model Card).
    """

    limit: float = option(7.0, help="largest value of g, and of |u|", min=1e-6)
    alpha: float = option(1.702, help="slope of the sigmoid; 1: SiLU, 1.702: an approximation of GELU", min=0)
    beta: float = option(1.0, help="constant added to u")

    @hookimpl
    def moe_experts(self, spec):
        return ClampedExperts(spec, self.limit, self.alpha, self.beta)


class ClampedExperts(Experts):
    """w_in [E, D, 2H] and b_in [E, 2H], g then u; w_out [E, H, out] and b_out [E, out]."""

    def __init__(self, spec, limit, alpha, beta):
        super().__init__()
        self.limit, self.alpha, self.beta = limit, alpha, beta
        ends = {"in": (spec.dim, 2 * spec.hidden, "in"), "out": (spec.hidden, spec.out_dim, "output")}
        for end, (before, after, role) in ends.items():
            self.expert_param(f"w_{end}", (spec.experts, before, after), fresh=uniform(before), role=role)
            if spec.bias:
                self.expert_param(f"b_{end}", (spec.experts, after), fresh=uniform(before), role=role)
        if not spec.bias:
            self.b_in = self.b_out = None

    def forward(self, x_ND, counts_E):
        counts = row_counts(counts_E)
        g_NH, u_NH = grouped_linear(x_ND, self.w_in, self.b_in, counts).chunk(2, dim=-1)
        g_NH, u_NH = g_NH.clamp(max=self.limit), u_NH.clamp(-self.limit, self.limit)
        hidden_NH = (u_NH + self.beta) * g_NH * (self.alpha * g_NH).sigmoid()
        return grouped_linear(hidden_NH, self.w_out, self.b_out, counts)
