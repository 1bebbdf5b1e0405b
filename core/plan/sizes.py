"""What a plan starts from: a model, its training, a cluster, and a split of the ranks. Nothing here imports torch."""

import math

import attrs

from ..errors import UsageError

WIDTH = {"fp32": 4, "bf16": 2}  # bytes of a value in a forward, by precision
WEIGHT = 4  # bytes of a weight and of its gradient: under autocast they stay fp32
MOMENTS = {"adamw": 8, "sgd": 0}  # bytes of optimizer state per weight: two fp32 moments; none without momentum


@attrs.frozen
class Model:
    """A Transformer with an MoE layer in each block. Raises UsageError.

    layers: L. dim: D. hidden: H of an expert. experts: E. top_k: K. sequence: tokens of a sequence. activation: relu,
    gelu or swiglu. out: values of a row that an expert returns, 0 = dim. attention: each block has attention, of 4 D^2
    weights. other: weights outside of the blocks that a token passes once, such as a head. Biases and norms are left
    out: they are of lower order.
    """

    layers: int
    dim: int
    hidden: int
    experts: int
    top_k: int = 2
    sequence: int = 1024
    activation: str = "relu"
    out: int = 0
    attention: bool = True
    other: int = 0

    def __attrs_post_init__(self) -> None:
        if self.top_k > self.experts:
            sentence = f"top_k={self.top_k}: with {self.experts} experts it must be 1 to {self.experts}"
            raise UsageError(sentence, code="bad-layer-spec")

    @property
    def out_dim(self) -> int:
        """Values of a row that an expert returns."""
        return self.out or self.dim

    @property
    def wide(self) -> int:
        """Columns of an expert's first matrix: H, or 2 H for swiglu."""
        return 2 * self.hidden if self.activation == "swiglu" else self.hidden

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: D W + H out."""
        return self.dim * self.wide + self.hidden * self.out_dim

    @property
    def block_weights(self) -> int:
        """Weights of one block outside of its experts: E D of the router, and 4 D^2 of attention."""
        return self.experts * self.dim + (4 * self.dim**2 if self.attention else 0)


@attrs.frozen
class Training:
    """How a model is trained. Raises UsageError.

    batch: sequences per rank and step. total_batch: sequences per step of all ranks together, instead of `batch`.
    precision: fp32, or bf16 for forwards under autocast. optimizer: adamw or sgd. parallel: data (weights replicated,
    as by DistributedDataParallel) or shard (weights, gradients and moments cut over all ranks, as by FSDP2, except
    those of experts that are cut over ranks already). skew: maxvio of the load, the busiest expert's load over the
    mean, minus 1.
    """

    batch: int = 8
    total_batch: int | None = None
    precision: str = "fp32"
    optimizer: str = "adamw"
    parallel: str = "data"
    skew: float = 0.0

    def sequences(self, ranks: int) -> int:
        """Sequences of the rank that has most. Raises UsageError if some rank has none."""
        if self.total_batch is None:
            return self.batch
        if self.total_batch < ranks:
            sentence = f"{ranks} ranks share {self.total_batch} sequences, so some have none; raise --total-batch"
            raise UsageError(sentence, code="more-ranks-than-sequences")
        return -(-self.total_batch // ranks)

    def sequences_of_all(self, ranks: int) -> int:
        """Sequences of one step."""
        return self.batch * ranks if self.total_batch is None else self.total_batch


@attrs.frozen
class Cluster:
    """Ranks that are alike, and what connects them. Raises UsageError.

    ranks: W. memory: bytes per rank. rate: FLOP/s of a rank's matrix products. bandwidth: bytes/s that leave a rank,
    and at the same time arrive. latency: seconds per message. node: consecutive ranks that are connected faster, with
    node_bandwidth; 1 = each rank is a node.
    """

    ranks: int
    memory: float
    rate: float
    bandwidth: float
    latency: float = 0.0
    node: int = 1
    node_bandwidth: float | None = None

    def __attrs_post_init__(self) -> None:
        for name in ("memory", "rate", "bandwidth", "latency", "node_bandwidth"):
            value = getattr(self, name)
            least = value >= 0 if name == "latency" else value is None or value > 0
            if not least or (value is not None and not math.isfinite(value)):
                bound = "at least 0" if name == "latency" else "above 0"
                spelled = name.replace("_", "-")
                raise UsageError(f"--{spelled} must be a number {bound}, not {value:g}", code="bad-cluster")
        if (self.node > 1) != (self.node_bandwidth is not None):
            raise UsageError("--node and --node-bandwidth only mean something together", code="half-a-node")

    def within(self, span: int) -> float:
        """Bytes/s between ranks of which the first and last are `span` places apart, counted inclusively."""
        inside = self.node_bandwidth is not None and span <= self.node
        return float(self.node_bandwidth or 0) if inside else self.bandwidth


def check_sizes(model: Model, training: Training, ranks: int) -> None:
    """Raise UsageError where bytes would pass what an int64 holds."""
    rows = training.sequences_of_all(ranks) * model.sequence * model.top_k
    weights = model.layers * (model.experts * model.expert_weights + model.block_weights) + model.other
    if max(rows * model.layers * (model.dim + model.wide + model.hidden), weights * ranks) * 16 >= 2**63:
        sentence = "a model and batch of these sizes have more than 10^18 bytes, which can't be planned"
        raise UsageError(sentence, code="sizes-too-large")


@attrs.frozen
class Split:
    """W = data x experts: experts are cut over `experts` consecutive ranks (P), and each part exists `data` times."""

    data: int
    experts: int

    @property
    def ranks(self) -> int:
        """W."""
        return self.data * self.experts

    def held(self, model: Model) -> int:
        """Experts of the fullest rank, in each layer: ceil(E / P), as torch.chunk cuts."""
        return -(-model.experts // self.experts)

    def sharded(self, parallel: str) -> tuple[bool, bool]:
        """Whether FSDP shards (the weights outside of experts, the experts): it leaves alone what is cut over ranks."""
        shard = parallel == "shard"
        return shard, shard and self.experts == 1

    def __str__(self) -> str:
        return f"{self.data} x {self.experts}"


def splits_of(model: Model, ranks: int) -> list[Split]:
    """Every split of the ranks with at most as many expert ranks as experts, the fewest first."""
    return [Split(ranks // count, count) for count in range(1, min(ranks, model.experts) + 1) if not ranks % count]
