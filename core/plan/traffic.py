"""Bytes that ranks send each other in one step, exactly: rows of assignments, their number, and gradients.

Rows that stay on their rank are not sent. [P, P]: from each rank of an expert group (first axis) to each.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sizes import WEIGHT, WIDTH, Model, Split, Training

Counts = NDArray[np.int64]
COUNT = 8  # bytes of a count, an int64
MATRICES = 2  # of an expert, reduced one after another


def rows_between(counts_RE: Counts, ranks: int) -> Counts:
    """[P, P] rows from each rank to each, given each rank's assignments per expert; one row of counts serves all ranks.

    Rank p holds the experts from p ceil(E / P) on, as torch.chunk cuts them.
    """
    counts_RE = np.atleast_2d(counts_RE)
    sources, experts = counts_RE.shape
    each = -(-experts // ranks)
    padded_RE = np.pad(counts_RE, ((0, 0), (0, each * ranks - experts)))
    return np.broadcast_to(padded_RE.reshape(sources, ranks, each).sum(2), (ranks, ranks))


def sent(rows_PP: Counts) -> Counts:
    """[P] rows that leave each rank for another."""
    return np.asarray(rows_PP.sum(1) - rows_PP.diagonal())


def received(rows_PP: Counts) -> Counts:
    """[P] rows that reach each rank from another."""
    return np.asarray(rows_PP.sum(0) - rows_PP.diagonal())


def exchanged_bytes(rows_PP: Counts, model: Model, precision: str) -> Counts:
    """[P] bytes that leave each rank in one MoE layer, forward and backward.

    Five all-to-alls: the counts, P - 1 times ceil(E / P) int64; rows of D to the experts; rows of `out` back; the
    gradients of the latter to the experts; those of the former back. Tokens are not deduplicated: a token that is sent
    to two experts of one rank is two rows.
    """
    ranks = len(rows_PP)
    counts = (ranks - 1) * -(-model.experts // ranks) * COUNT
    there_and_back_P = sent(rows_PP) + received(rows_PP)  # forward goes one way, backward the other
    return np.asarray(there_and_back_P * (model.dim + model.out_dim) * WIDTH[precision] + counts)


def ring_bytes(size: int, ranks: int, passes: int) -> int:
    """Bytes that leave a rank when `size` bytes pass a ring: passes (n - 1) / n size.

    An all-reduce has 2 passes (a reduce-scatter and an all-gather), each of those 1. Source: Patarasuk and Yuan, 2009
    (Bandwidth optimal all-reduce algorithms for clusters of workstations).
    """
    return passes * (ranks - 1) * size // ranks


class Ring(NamedTuple):
    """What passes a ring of ranks in one step. size: bytes. passes: 2 for an all-reduce of gradients. 3 if weights are
    sharded: an all-gather of weights in forward, another in backward, and a reduce-scatter of gradients. lots: how many
    parts of `size` pass one after another. span: places from the first rank to the last, counted inclusively.

    Source: Rajbhandari et al., 2020 (ZeRO: memory optimizations toward training trillion parameter models, section 7).
    """

    size: int
    ranks: int
    passes: int
    lots: int
    span: int

    @property
    def bytes_of_a_rank(self) -> int:
        """Bytes that leave a rank."""
        return ring_bytes(self.size, self.ranks, self.passes)

    @property
    def messages(self) -> int:
        """Messages that a rank sends one after another: n - 1 per pass and lot."""
        return self.lots * self.passes * (self.ranks - 1)


def rings_of(model: Model, training: Training, split: Split) -> tuple[Ring, Ring]:
    """The ring of all W ranks, for weights outside of experts, and that of the `data` ranks that have the same experts.

    The latter takes every P-th rank. A lot is everything; of sharded weights a layer; of experts that are cut over
    ranks one of the two matrices of a layer.
    """
    shared = (model.layers * model.block_weights + model.other) * WEIGHT
    own = model.layers * split.held(model) * model.expert_weights * WEIGHT
    shard, shard_experts = split.sharded(training.parallel)
    lots = model.layers if shard_experts else 1 if split.experts == 1 else MATRICES * model.layers
    return (
        Ring(shared, split.ranks, 3 if shard else 2, model.layers if shard else 1, split.ranks),
        Ring(own, split.data, 3 if shard_experts else 2, lots, split.ranks - split.experts + 1),
    )


def gradient_bytes(model: Model, training: Training, split: Split) -> int:
    """Bytes of gradients, and of weights that are sharded, that leave a rank per step."""
    return sum(ring.bytes_of_a_rank for ring in rings_of(model, training, split))
