"""The MoE layer: forward, sums, dispatch, experts."""
