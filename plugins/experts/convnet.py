from math import isqrt

import attrs
from torch.nn import functional as F

from moe_engine import ACTIVATIONS, Experts, grouped_conv, grouped_linear, hookimpl, option, row_counts, uniform


@attrs.define(eq=False)
class ConvNet:
    """A small CNN per expert, on a token seen as an image.

    h_0 = x [channels, side, side] with channels side^2 = dim; h_i = pool(act(h_{i-1} * k_i + b_i)); y = W h_n + b.
    Windows are 3 x 3 pixels with the border padded with zeros; pool is max-pooling over 2 x 2. The layer's hidden
    width is ignored: `hidden` counts channels.

    Source: LeCun et al., 1998 (Gradient-Based Learning Applied to Document Recognition).
    """

    channels: int = option(1, help="channels of the image that a token represents", min=1)
    hidden: tuple[int, ...] = option((16, 32), help="output channels of each convolution, from first to last")

    @hookimpl
    def moe_check(self, setup):
        if not self.hidden or min(self.hidden) < 1:
            return f"convnet.hidden is {list(self.hidden)}; give at least one channel count, as in 16,32"
        dim, side = setup.spec.dim, isqrt(setup.spec.dim // self.channels)
        if dim and side**2 * self.channels != dim:
            return f"convnet.channels={self.channels}: a token of size {dim} is not an image of channels x side x side"
        if dim and side >> len(self.hidden) == 0:
            return f"convnet.hidden: {len(self.hidden)} poolings are too many for an image with a side of {side} pixels"
        return None

    @hookimpl
    def moe_experts(self, spec):
        return ConvNetExperts(spec, self.channels, self.hidden)


class ConvNetExperts(Experts):
    """k_i [E, 9 C, H], for swiglu [E, 9 C, 2H], C input and H output channels; out [E, H pixels, out]."""

    def __init__(self, spec, channels, hidden):
        super().__init__()
        self.act, self.layers = ACTIVATIONS[spec.activation], len(hidden)
        self.side = isqrt(spec.dim // channels)
        twice = 2 if spec.activation == "swiglu" else 1
        for i, (before, after) in enumerate(zip((channels, *hidden), hidden, strict=False)):
            self._linear(spec, f"k_{i}", f"b_{i}", 9 * before, twice * after, "in")
        self._linear(spec, "out", "b_out", hidden[-1] * (self.side >> self.layers) ** 2, spec.out_dim, "output")

    def _linear(self, spec, weight, bias, before, after, role):
        self.expert_param(weight, (spec.experts, before, after), fresh=uniform(before), role=role)
        if spec.bias:
            self.expert_param(bias, (spec.experts, after), fresh=uniform(before), role=role)

    def forward(self, x_ND, counts_E):
        x = x_ND.unflatten(-1, (-1, self.side, self.side)).permute(0, 2, 3, 1)
        for i in range(self.layers):
            x = self.act(grouped_conv(x, getattr(self, f"k_{i}"), getattr(self, f"b_{i}", None), counts_E))
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return grouped_linear(x.flatten(1), self.out, getattr(self, "b_out", None), row_counts(counts_E))
