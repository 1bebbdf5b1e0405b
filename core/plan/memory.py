"""Memory of the fullest rank, in bytes: weights, gradients, moments, and what backward needs of a forward."""

import math

import attrs

from .sizes import MOMENTS, WEIGHT, WIDTH, Model, Split, Training

KEPT_BY_ATTENTION = 7  # values per token and D: before and after the norm, q, k, v, their mix, before the second norm
GATHERED = 2  # layers whose sharded weights are whole at a time: the one at work, and the next, fetched ahead


@attrs.frozen
class Memory:
    """Bytes on the fullest rank. gathered: sharded weights, and one layer's gradients, while they are whole."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.moments + self.gathered + self.activations


def weights_held(model: Model, training: Training, split: Split) -> int:
    """Weights that a rank stores; a sharded weight is cut over all ranks."""
    sizes = model.layers * model.block_weights + model.other, model.layers * split.held(model) * model.expert_weights
    cut = split.sharded(training.parallel)
    return sum(math.ceil(size / split.ranks) if each else size for size, each in zip(sizes, cut, strict=True))


def gathered_bytes(model: Model, training: Training, split: Split) -> int:
    """Bytes of sharded weights of two layers and gradients of one while they are whole, next to the shards."""
    shared, own = split.sharded(training.parallel)
    if split.ranks == 1:
        return 0
    whole = shared * model.block_weights + own * split.held(model) * model.expert_weights
    return (GATHERED + 1) * whole * WEIGHT


def activation_bytes(model: Model, training: Training, tokens: int, rows_here: int) -> int:
    """Bytes that the forwards of all layers keep for backward, without recomputation.

    tokens: of this rank. rows_here: assignments of all ranks whose experts are here. A token keeps 7 D for attention
    without its scores, as flash attention does (Dao et al., 2022), D before the experts, and K rows of `out` for the
    gradient of its gates; a row keeps its D, and the hidden values before and after the activation.
    """
    attention = KEPT_BY_ATTENTION * model.dim if model.attention else 0
    per_token = attention + model.dim + model.top_k * model.out_dim
    per_row = model.dim + model.wide + model.hidden
    return model.layers * (tokens * per_token + rows_here * per_row) * WIDTH[training.precision]


def memory_of(model: Model, training: Training, split: Split, tokens: int, rows_here: int) -> Memory:
    """The memory of the fullest rank, which has ceil(E / P) experts and `rows_here` rows."""
    held = weights_held(model, training, split)
    return Memory(
        weights=held * WEIGHT,
        gradients=held * WEIGHT,
        moments=held * MOMENTS[training.optimizer],
        gathered=gathered_bytes(model, training, split),
        activations=activation_bytes(model, training, tokens, rows_here),
    )
