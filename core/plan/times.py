"""Time of a step, in seconds: matrix products, all-to-all and gradients one after another. Nothing overlaps.

The busiest rank decides, because each layer's exchanges make the others wait for it.
"""

import attrs
import numpy as np
from numpy.typing import NDArray

from .sizes import WIDTH, Cluster, Model, Split, Training
from .traffic import COUNT, Counts, rings_of

FORWARD_AND_BACKWARD = 3  # times the FLOPs of a forward: backward makes two products of each one
ROW_EXCHANGES = 4  # all-to-alls of rows per layer: to the experts and back, in forward and in backward


@attrs.frozen
class Times:
    """Seconds of a step. products: the busiest rank's. ideal: the products, had every rank an equal part of them."""

    products: float
    exchange: float
    gradients: float
    ideal: float

    @property
    def step(self) -> float:
        """Their sum."""
        return self.products + self.exchange + self.gradients

    @property
    def efficiency(self) -> float:
        """The share of a step that the products would take, were they even and nothing sent."""
        return self.ideal / self.step

    @property
    def losses(self) -> dict[str, float]:
        """Where the rest of a step goes, as shares of it."""
        waiting = max(self.products - self.ideal, 0.0)
        lost = {"waiting for the busiest rank": waiting, "all-to-all": self.exchange, "gradients": self.gradients}
        return {name: seconds / self.step for name, seconds in lost.items()}


def expert_flops(model: Model) -> int:
    """FLOPs of an expert's forward on one row: 2 D W + 2 H out, W = H, or 2 H for swiglu."""
    return 2 * model.expert_weights


def token_flops(model: Model) -> int:
    """FLOPs of a token's forward outside of experts: 2 per weight, and 4 S D per layer of attention scores.

    Source: Chowdhery et al., 2022 (PaLM, appendix B). A causal mask is not taken off.
    """
    scores = 4 * model.sequence * model.dim if model.attention else 0
    return model.layers * (2 * model.block_weights + scores) + 2 * model.other


def step_flops(model: Model, tokens: float, rows: float) -> float:
    """FLOPs of a step, forward and backward. tokens: tokens that pass the blocks. rows: rows of experts, per layer."""
    return FORWARD_AND_BACKWARD * (tokens * token_flops(model) + model.layers * rows * expert_flops(model))


def exchange_seconds(rows_PP: Counts, model: Model, training: Training, cluster: Cluster) -> float:
    """Seconds of one layer's five all-to-alls: latency (P - 1) + the most that a rank sends or receives / bandwidth.

    A rank sends to one peer after another. Source: Thakur, Rabenseifner and Gropp, 2005 (Optimization of collective
    communication operations in MPICH: pairwise exchange). Within a node, rows have the node's bandwidth.
    """
    ranks = len(rows_PP)
    width = (model.dim + model.out_dim) / 2 * WIDTH[training.precision]  # two exchanges of D, two of `out`
    near_PP = neighbours(ranks, cluster)
    slow, fast = _busiest(np.where(near_PP, 0, rows_PP)), _busiest(np.where(near_PP, rows_PP, 0))
    counts = (ranks - 1) * -(-model.experts // ranks) * COUNT / cluster.within(ranks)
    rows = width * (slow / cluster.bandwidth + fast / (cluster.node_bandwidth or cluster.bandwidth))
    return ROW_EXCHANGES * rows + counts + (ROW_EXCHANGES + 1) * (ranks - 1) * cluster.latency


def neighbours(ranks: int, cluster: Cluster) -> NDArray[np.bool_]:
    """[P, P] whether two ranks of an expert group share a node; none do if groups and nodes straddle each other."""
    if ranks % cluster.node and cluster.node % ranks:
        return np.zeros((ranks, ranks), bool)
    node_P = np.arange(ranks) // cluster.node
    return np.asarray(node_P[:, None] == node_P)


def _busiest(rows_PP: Counts) -> int:
    """The most rows that a rank sends to others or receives from them."""
    own_P = rows_PP.diagonal()
    return int(max((rows_PP.sum(1) - own_P).max(), (rows_PP.sum(0) - own_P).max()))


def gradient_seconds(model: Model, training: Training, split: Split, cluster: Cluster) -> float:
    """Seconds of the gradients' rings, and of the weights' that are sharded: bytes / bandwidth + latency x messages.

    A ring that leaves a node is as slow as the connection between nodes.
    """
    rings = rings_of(model, training, split)
    return sum(one.bytes_of_a_rank / cluster.within(one.span) + one.messages * cluster.latency for one in rings)


def times_of(model: Model, training: Training, split: Split, cluster: Cluster, rows_PP: Counts, tokens: int) -> Times:
    """The times of a step. rows_PP: of one layer, between the ranks of an expert group; every layer is alike.

    tokens: of the rank that has most.
    """
    busiest = step_flops(model, tokens, float(rows_PP.sum(0).max()))
    shared = training.sequences_of_all(split.ranks) * model.sequence / split.ranks
    ideal = step_flops(model, shared, shared * model.top_k)
    exchange = model.layers * exchange_seconds(rows_PP, model, training, cluster) if split.experts > 1 else 0.0
    gradients = gradient_seconds(model, training, split, cluster)
    return Times(busiest / cluster.rate, exchange, gradients, ideal / cluster.rate)
