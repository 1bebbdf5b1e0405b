from math import isqrt

import attrs

from moe_engine import ACTIVATIONS, Experts, grouped_conv, hookimpl, option, uniform


@attrs.define(eq=False)
class Conv:
    """Two 2-d convolutions on a token seen as an image.

    y = act(x * k_in + b_in) * k_out + b_out, x [channels, side, side] with channels side^2 = dim, the border padded
    with zeros. The layer's hidden width is ignored: `hidden` counts the channels in between.

    Source: LeCun et al., 1989 (Backpropagation Applied to Handwritten Zip Code Recognition).
    """

    channels: int = option(1, help="channels of the image that a token represents", min=1)
    hidden: int = option(8, help="channels between the two convolutions", min=1)
    kernel: int = option(3, help="side of the convolution window, in pixels", choices=(1, 3, 5, 7))

    @hookimpl
    def moe_check(self, setup):
        dim, out = setup.spec.dim, setup.spec.out_dim
        pixels = isqrt(dim // self.channels) ** 2
        if dim and pixels * self.channels != dim:
            return f"conv.channels={self.channels}: a token of size {dim} is not an image of channels x side x side"
        if dim and out % pixels:
            return f"conv: out={out} is not divisible by {pixels} pixels"
        return None

    @hookimpl
    def moe_experts(self, spec):
        return ConvExperts(spec, self.channels, self.hidden, self.kernel)


class ConvExperts(Experts):
    """k_in [E, C k^2, H], for swiglu [E, C k^2, 2H], k_out [E, H k^2, C'], windows flattened as F.unfold does.

    The names differ from a stacked MLP's, because a hidden channel is many rows of k_out: initializers that split
    hidden units refuse names they don't know.
    """

    def __init__(self, spec, channels, hidden, kernel):
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        self.side = isqrt(spec.dim // channels)
        wide = 2 * hidden if spec.activation == "swiglu" else hidden
        ends = {"in": (channels, wide, "in"), "out": (hidden, spec.out_dim // self.side**2, "output")}
        for end, (before, after, role) in ends.items():
            fan_in = before * kernel**2
            self.expert_param(f"k_{end}", (spec.experts, fan_in, after), fresh=uniform(fan_in), role=role)
            if spec.bias:
                self.expert_param(f"b_{end}", (spec.experts, after), fresh=uniform(fan_in), role=role)
        if not spec.bias:
            self.b_in = self.b_out = None

    def forward(self, x_ND, counts_E):
        images = x_ND.unflatten(-1, (-1, self.side, self.side)).permute(0, 2, 3, 1)
        hidden = self.act(grouped_conv(images, self.k_in, self.b_in, counts_E))
        return grouped_conv(hidden, self.k_out, self.b_out, counts_E).permute(0, 3, 1, 2).flatten(1)
