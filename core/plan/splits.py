"""Every data x expert split of some ranks, the best one, and where more ranks stop helping."""

from collections.abc import Sequence
from typing import Any

import attrs

from ..errors import UsageError
from .loads import load_of
from .memory import Memory, memory_of
from .sizes import Cluster, Model, Split, Training, check_sizes, splits_of
from .times import Times, times_of
from .traffic import exchanged_bytes, gradient_bytes, rows_between

LADDER = (*(2**power for power in range(10)), 1000)
WORTH_IT = 0.5  # more ranks should bring at least this share of what they could


@attrs.frozen
class Planned:
    """One split, planned. exchanged: bytes of all-to-all that leave the rank that sends most, per step; exchanged_all:
    those of all ranks. reduced: bytes of gradients, and of sharded weights, that leave a rank."""

    split: Split
    memory: Memory
    exchanged: int
    exchanged_all: int
    reduced: int
    times: Times
    tokens: int  # of a step, over all ranks

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.times.step

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds and tokens, whole numbers where they are counts."""
        return {
            **{"data": self.split.data, "experts": self.split.experts, "ranks": self.split.ranks},
            "memory": {**attrs.asdict(self.memory), "total": self.memory.total},
            "exchange_bytes": self.exchanged,
            "exchange_bytes_of_all_ranks": self.exchanged_all,
            "gradient_bytes": self.reduced,
            "seconds": {**attrs.asdict(self.times), "step": self.times.step},
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.times.efficiency,
        }


def planned(model: Model, training: Training, split: Split, cluster: Cluster) -> Planned:
    """The plan of one split. Each rank and each layer routes alike."""
    tokens = training.sequences(split.ranks) * model.sequence
    load_E = load_of(model.experts, tokens * model.top_k, model.top_k, training.skew)
    rows_PP = rows_between(load_E, split.experts)
    leaving_P = model.layers * exchanged_bytes(rows_PP, model, training.precision)
    return Planned(
        split=split,
        memory=memory_of(model, training, split, tokens, int(rows_PP.sum(0).max())),
        exchanged=int(leaving_P.max()),
        exchanged_all=int(leaving_P.sum()) * split.data,
        reduced=gradient_bytes(model, training, split),
        times=times_of(model, training, split, cluster, rows_PP, tokens),
        tokens=training.sequences_of_all(split.ranks) * model.sequence,
    )


def plan_of(model: Model, training: Training, cluster: Cluster) -> tuple[list[Planned], list[Planned]]:
    """(splits that fit into the ranks' memory, those that do not), the fewest expert ranks first."""
    check_sizes(model, training, cluster.ranks)
    tried = [planned(model, training, split, cluster) for split in splits_of(model, cluster.ranks)]
    fitting = [one for one in tried if one.memory.total <= cluster.memory]
    return fitting, [one for one in tried if one.memory.total > cluster.memory]


def best_of(fitting: Sequence[Planned]) -> Planned:
    """The split of the shortest step; of two as short, the one with fewer expert ranks."""
    return min(fitting, key=lambda one: (one.times.step, one.split.experts))


def require_fit(fitting: Sequence[Planned], others: Sequence[Planned], cluster: Cluster) -> None:
    """Raise UsageError if no split fits."""
    if not fitting:
        least = min(others, key=lambda one: one.memory.total)
        need, have = least.memory.total / 1e9, cluster.memory / 1e9
        sentence = f"no split of {cluster.ranks} ranks fits into {have:g} GB each: the least, {least.split}, takes"
        raise UsageError(f"{sentence} {need:.3g} GB; use more ranks, --parallel shard or less", code="does-not-fit")


def ladder_of(model: Model, training: Training, cluster: Cluster) -> list[Planned]:
    """The best split of 1, 2, 4, ... 512 and 1000 ranks, without the numbers of ranks that can't train the model."""
    steps = []
    for ranks in LADDER:
        if training.total_batch is None or ranks <= training.total_batch:
            fitting, _ = plan_of(model, training, attrs.evolve(cluster, ranks=ranks))
            steps += [best_of(fitting)] if fitting else []
    return steps


def gain(before: Planned, after: Planned) -> float:
    """What more ranks bring, as a share of what they could: 1 if twice the ranks make twice the tokens per second."""
    faster = after.tokens_per_second / before.tokens_per_second
    return (faster - 1) / (after.split.ranks / before.split.ranks - 1)


def stop_of(steps: Sequence[Planned]) -> int | None:
    """The place on the ladder after which no more ranks bring half of what they could; None if that is the last."""
    worth_it = [at for at in range(1, len(steps)) if gain(steps[at - 1], steps[at]) >= WORTH_IT]
    stop = max(worth_it, default=0)
    return stop if stop < len(steps) - 1 else None


def where_it_stops(steps: Sequence[Planned]) -> str:
    """A sentence on where scaling stops, and what takes most of the time that is lost there."""
    if not steps:
        return f"no number of ranks up to {LADDER[-1]} has room for it"
    stop = stop_of(steps)
    if stop is None:
        last = steps[-1]
        return f"it scales to {last.split.ranks} ranks, at an efficiency of {last.times.efficiency:.0%}{_loss(last)}"
    here, more = steps[stop], steps[stop + 1]
    brought = max(gain(here, more), 0.0)
    return (
        f"it stops scaling at {here.split.ranks} ranks, at an efficiency of {here.times.efficiency:.0%}: "
        f"{more.split.ranks} bring {brought:.0%} of what the additional ones could{_loss(more)}"
    )


def _loss(at: Planned) -> str:
    cause, share = max(at.times.losses.items(), key=lambda pair: pair[1])
    return (
        f"; {cause} {'take' if cause.endswith('s') else 'takes'} {share:.0%} of a step there" if share >= 0.005 else ""
    )
