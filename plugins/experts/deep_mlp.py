import attrs
from torch.nn import functional as F

from moe_engine import (
    ACTIVATIONS,
    Experts,
    grouped_linear,
    hookimpl,
    ones,
    option,
    own_values,
    row_counts,
    uniform,
    zeros,
)


@attrs.define(eq=False)
class DeepMLP:
    """Perceptrons with several hidden layers each.

    h_0 = x; h_i = dropout(act(norm(h_{i-1} W_i + b_i))); y = h_n W_out + b_out, with biases where the layer has
    them. norm is LayerNorm with a gain and shift per expert. The layer's hidden width is ignored: `hidden` gives the
    widths.

    Sources: Rosenblatt, 1958 (The Perceptron); Ba et al., 2016 (Layer Normalization); Srivastava et al., 2014
    (Dropout).
    """

    hidden: tuple[int, ...] = option((128, 64), help="widths of the hidden layers, from first to last")
    activation: str | None = option(None, help="activation in between; unset: the layer's", choices=tuple(ACTIVATIONS))
    norm: bool = option(False, help="LayerNorm before each activation")
    dropout: float = option(0.0, help="share of hidden units dropped in training", min=0, max=0.95)

    @hookimpl
    def moe_check(self, setup):
        if not self.hidden or min(self.hidden) < 1:
            return f"deep_mlp.hidden is {list(self.hidden)}; give at least one width, each at least 1, as in 128,64"
        if setup.spec.causal and self.dropout:
            return "deep_mlp.dropout depends on row positions, which later tokens shift; set it to 0 in a causal layer"
        return None

    @hookimpl
    def moe_experts(self, spec):
        return DeepExperts(spec, self.hidden, self.activation or spec.activation, self.norm, self.dropout)


class DeepExperts(Experts):
    """w_i [E, before, wide], `wide` twice the width for swiglu; b_i, gain_i, shift_i [E, wide]; i from 0."""

    def __init__(self, spec, hidden, activation, norm, dropout):
        super().__init__()
        self.act, self.norm, self.dropout = ACTIVATIONS[activation], norm, dropout
        self.layers = len(hidden)
        wides = [2 * width if activation == "swiglu" else width for width in hidden]
        for i, (before, after) in enumerate(zip((spec.dim, *hidden), (*wides, spec.out_dim), strict=True)):
            role = "output" if i == self.layers else "in"
            self.expert_param(f"w_{i}", (spec.experts, before, after), fresh=uniform(before), role=role)
            if spec.bias:
                self.expert_param(f"b_{i}", (spec.experts, after), fresh=uniform(before), role=role)
            if norm and i < self.layers:
                self.expert_param(f"gain_{i}", (spec.experts, after), fresh=ones, role="in")
                self.expert_param(f"shift_{i}", (spec.experts, after), fresh=zeros, role="in")

    def forward(self, x_ND, counts_E):
        counts = row_counts(counts_E)
        for i in range(self.layers):
            x_ND = self.act(self._normed(i, self._linear(i, x_ND, counts), counts_E))
            x_ND = F.dropout(x_ND, self.dropout, self.training)
        return self._linear(self.layers, x_ND, counts)

    def _linear(self, i, x, counts):
        return grouped_linear(x, getattr(self, f"w_{i}"), getattr(self, f"b_{i}", None), counts)

    def _normed(self, i, h, counts_E):
        if not self.norm:
            return h
        gain, shift = (own_values(getattr(self, f"{name}_{i}"), counts_E, h.shape[0]) for name in ("gain", "shift"))
        return F.layer_norm(h, h.shape[-1:]) * gain + shift
