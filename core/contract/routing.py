"""The records of a routing decision, and what every router needs: tie-breaking, assignments, group limits.

Raw logits, biased logits, scores, selected assignments and kept assignments are five different things.

A choice is exact: `Level.select_by` holds the promise.

Suffixes: T tokens, E experts, K chosen per token, N assignments, n units of a level.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from ..errors import UsageError
from ..processes import sum_over_ranks
from .numerics import at_least_fp32, count_by

# odd factors that spread neighbouring integers, as int32, in which products wrap alike on every device
GOLDEN = 0x9E3779B1 - 2**32  # 2^32 over the golden ratio
MIXING = 0x85EBCA6B - 2**32  # of MurmurHash3's finalizer


@attrs.frozen
class Spec:
    """The sizes and settings of a layer; sizes not known yet (before a model is built) are 0. Raises UsageError.

    dim: D of the input. hidden: H of an expert. out: D of the output, 0 = dim. experts: E. top_k: K.
    activation: relu, gelu or swiglu. bias: experts have bias vectors. shared: number of shared experts, which
    process every token. shared_gate: multiply their output by a learned sigmoid(x w). capacity: in training an expert
    keeps at most ceil(capacity*T*K/E) of T real tokens; None drops nothing. eval_capacity: the same in evaluation.
    capacity_per: T counts a batch, or each sequence, an expert then keeping that many of each; a sequence is the last
    axis of x before D. vocab: number of token ids, if the layer is given ids. classes: number of labels, if it is given
    labels. causal: a token must not see later ones. allow_no_gradient: accept, with a remark, that the task gives the
    router no gradient. local_losses: with several ranks, compute losses on each rank's tokens alone.
    """

    dim: int
    hidden: int
    out: int = 0
    experts: int = 8
    top_k: int = 2
    activation: str = "relu"
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    capacity: float | None = None
    eval_capacity: float | None = None
    capacity_per: str = "batch"
    vocab: int | None = None
    classes: int | None = None
    causal: bool = False
    allow_no_gradient: bool = False
    local_losses: bool = False

    def __attrs_post_init__(self) -> None:
        for name in ("dim", "hidden", "out", "experts", "top_k", "shared"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise _bad_spec(f"{name} of a layer must be a whole number >= 0, not {value!r}")
        if self.shared_gate and not self.shared:
            raise _bad_spec("shared_gate is the gate of shared experts, but the layer has none; set shared")
        if self.experts < 1:
            raise _bad_spec(f"experts={self.experts}: a layer needs at least one expert")
        if not 1 <= self.top_k <= self.experts:
            raise _bad_spec(f"top_k={self.top_k}: with {self.experts} experts it must be 1 to {self.experts}")
        for name in ("capacity", "eval_capacity"):
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value <= 1e6:
                raise _bad_spec(f"{name}={value} must be 1e-6 to 1e6, or unset to drop nothing")
        if self.capacity_per not in ("batch", "sequence"):
            raise _bad_spec(f"capacity_per is '{self.capacity_per}'; choose batch or sequence")
        if self.activation not in ("relu", "gelu", "swiglu"):
            raise _bad_spec(f"activation is '{self.activation}'; choose relu, gelu or swiglu")

    @property
    def out_dim(self) -> int:
        """D of the output."""
        return self.out or self.dim

    @property
    def limited(self) -> bool:
        """Whether experts have a capacity, in training or in evaluation."""
        return self.capacity is not None or self.eval_capacity is not None


def _bad_spec(message: str) -> UsageError:
    return UsageError(message, code="bad-layer-spec")


@attrs.define(eq=False)
class Tokens:
    """The tokens of one forward, flattened. Padding tokens are all zeros in x.

    x [T, D]: the input. shape: the leading shape, (B, S) or (T,). mask [T]: bool, True is a real token; None if all
    are real. ids [T]: token ids, or None. labels [T]: class or domain, or None. count: the number of real tokens, an
    integer scalar. lots [T]: the hash of each token that parts equal scores. carried [T, C]: what the router of the
    layer before passes on, for a router that `carries`; zeros in the first layer. summed: count, sums and means are
    those of all ranks; the tensors stay this rank's.
    """

    x: Tensor
    shape: tuple[int, ...]
    mask: Tensor | None = None
    ids: Tensor | None = None
    labels: Tensor | None = None
    _lots: Tensor | None = None
    carried: Tensor | None = None
    summed: bool = False
    count: Tensor = attrs.field(init=False)

    @property
    def lots(self) -> Tensor:
        """[T] int32: a hash of each token's vector; that of x unless it was given, as by a trace, which has no x."""
        if self._lots is None:
            self._lots = lots_of(self.x)
        return self._lots

    def __attrs_post_init__(self) -> None:
        if self.mask is None:
            self.count = torch.full((), self.x.shape[0], dtype=torch.long, device=self.x.device)
        else:
            self.count = self.mask.sum()
        self.count = self.total(self.count)

    def total(self, own: Tensor) -> Tensor:
        """A sum over this rank's tokens, added up over the ranks if `summed`: then all ranks must call it."""
        return sum_over_ranks(own) if self.summed else own

    def real(self, values: Tensor) -> Tensor:
        """values [T, ...] with zeros at padding."""
        if self.mask is None:
            return values
        return torch.where(self.mask.view(-1, *[1] * (values.dim() - 1)), values, 0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over real tokens of values [T] or [T, n]; without real tokens 0, still attached to the graph."""
        return self.sum(values) / self.count.clamp(min=1)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over real tokens of values [T] or [T, n]."""
        return self.total(self.real(values).sum(0))


def lots_of(x_TD: Tensor, most: int = 256) -> Tensor:
    """[T] int32: a hash of up to `most` entries of each row, rounded, so that a change in a last bit seldom changes it.

    It is a sum of integers, which no order of adding changes: neither batch, place nor device matters.
    """
    some_TD = x_TD.detach()[:, :: -(-x_TD.shape[1] // most) or 1].bfloat16() + 0.0  # -0.0 is 0.0
    coarse_TD = some_TD.view(torch.int16) >> 3  # sign, exponent and four bits
    factor_D = torch.arange(1, some_TD.shape[1] + 1, dtype=torch.int32, device=x_TD.device) * GOLDEN
    factor_D = (factor_D ^ (factor_D >> 15)) * MIXING
    return (coarse_TD * (factor_D ^ (factor_D >> 13))).sum(-1, dtype=torch.int32)


class LevelSpec(NamedTuple):
    """One level of a router.

    size: the number of units. top_k: the number that a token chooses; 0 if it does not choose at this level.
    limited: a token may choose only from some groups of units.
    """

    name: str
    size: int
    top_k: int
    limited: bool = False


@attrs.define(eq=False)
class Level:
    """The scores of one level of a router. logits [T, n]: raw. biased [T, n]: with the biases that gates see.

    tokens: whose scores they are. index: 0 for the coarsest level. bias [n]: the sum of the selection-only biases, or
    None. scores [T, n]: the scores that selection ranked, without that bias; None before selection.
    """

    name: str
    logits: Tensor
    biased: Tensor
    tokens: Tokens
    index: int = 0
    bias: Tensor | None = None
    scores: Tensor | None = None

    def select_by(self, scores: Tensor) -> Tensor:
        """[T, n] float64, to take the top of: scores [T, n] plus the selection bias, equal ones parted.

        Given the same bits of its vector and its scores, a token chooses the same experts, whatever its batch, place
        or padding. A larger fp32 score always wins; only equal scores are parted, by a hash of the token, independent
        per unit and per level. Identical tokens choose alike.
        """
        self.scores = scores.detach()
        return self.part_ties(self.scores if self.bias is None else self.scores + self.bias)

    def part_ties(self, scores: Tensor, draw: int = 0) -> Tensor:
        """[T, n] float64: scores [T, n] as fp32, equal ones parted; rounded to fp32 it is the scores again.

        draw: another one parts the same ties independently. A device without float64 gets the fp32 scores, unparted.
        """
        s_Tn = scores.detach().float()
        if s_Tn.device.type == "mps":
            return s_Tn
        lot_T = (self.tokens.lots ^ (self.index + 16 * draw)) * MIXING  # int32, which wraps alike everywhere
        lot_T = lot_T ^ (lot_T >> 15)  # so that levels and draws are independent
        unit_n = torch.arange(s_Tn.shape[1], dtype=torch.int32, device=s_Tn.device)
        turn_Tn = (lot_T[:, None] ^ (unit_n * GOLDEN)) * GOLDEN
        # A turn moves a score by at most 2^-27 of it, an eighth of the least gap between fp32 numbers. -inf stays.
        size_Tn = s_Tn.abs().clamp_(2.0**-124, 2.0**96).mul_(turn_Tn)
        return torch.add(s_Tn.double(), size_Tn, alpha=2**-58)


@attrs.define(eq=False)
class Assignments:
    """Which token goes to which expert. All tensors are [N].

    token, expert: indices. weight: the gate, attached to the graph. rank: 0 for a token's first choice. selected: an
    actual choice of a real token. kept: selected and within capacity. chances: for a router with noise, a function
    that returns the probability [T, E] that a token would choose each expert if its noise were redrawn, attached
    to the graph. each: K if every token has K assignments and those of a token follow each other, 0 otherwise.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    rank: Tensor
    selected: Tensor
    kept: Tensor
    chances: Callable[[], Tensor] | None = None
    each: int = 0

    @property
    def dropped(self) -> Tensor:
        """[N] bool: selected, but over capacity."""
        return self.selected & ~self.kept


def assign(
    weight_TK: Tensor, expert_TK: Tensor, tokens: Tokens, chances: Callable[[], Tensor] | None = None
) -> Assignments:
    """The assignments if every token chooses K experts, best first: weight_TK, expert_TK."""
    count, top_k = expert_TK.shape
    device = expert_TK.device
    place = torch.arange(count * top_k, device=device)
    token, rank = place // top_k, place % top_k
    selected = torch.ones_like(token, dtype=torch.bool) if tokens.mask is None else tokens.mask[token]
    return Assignments(token, expert_TK.reshape(-1), weight_TK.reshape(-1), rank, selected, selected, chances, top_k)


def assign_where(weight_TE: Tensor, chosen_TE: Tensor, tokens: Tokens) -> Assignments:
    """The assignments if tokens choose any number of experts: those where chosen_TE [T, E] is True."""
    if tokens.mask is not None:
        chosen_TE = chosen_TE & tokens.mask[:, None]
    order_TE = weight_TE.detach().masked_fill(~chosen_TE, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank_TE = order_TE.argsort(dim=-1)
    if torch.compiler.is_compiling():  # shapes must not depend on values: keep every pair, most not selected
        pair_TE = torch.ones_like(chosen_TE).cumsum(0) - 1, torch.ones_like(chosen_TE).cumsum(1) - 1
        token, expert = (pair.flatten() for pair in pair_TE)
    else:
        token, expert = chosen_TE.nonzero(as_tuple=True)
    selected = chosen_TE[token, expert]
    return Assignments(token, expert, weight_TE[token, expert], rank_TE[token, expert], selected, selected)


@attrs.define(eq=False)
class Slots:
    """Mixtures of tokens instead of choices: expert e works on n slots of each group of tokens.

    dispatch, combine [G, S, E, n] for G groups of S tokens: a slot is the sum of its group's tokens, weighted by
    dispatch; a token's output is the sum of all slots' outputs, weighted by combine. Both are 0 at padding.
    """

    dispatch: Tensor
    combine: Tensor

    @property
    def each(self) -> int:
        """Number of slots per group; each token of the group is mixed into all of them."""
        return self.dispatch.shape[2] * self.dispatch.shape[3]


@attrs.define(eq=False)
class Routing:
    """One decision: where the tokens of one forward go, and why.

    levels: from coarse to fine; empty for a router without logits. probs [T, E]: each token's
    distribution over experts, or None. slots: set by a router that mixes tokens; its plan has no assignments.
    carried [T, C]: what a router that `carries` passes on to the next layer.
    load [E]: assignments of real tokens to each expert, before capacity drops any; has no gradient.

    Tensors of [T], [N] and more are this rank's. A loss is given the routing with `load`, sums and means over the
    tokens of all ranks, unless `Spec.local_losses` is set.
    """

    tokens: Tokens
    levels: tuple[Level, ...]
    probs: Tensor | None
    plan: Assignments
    experts: int
    top_k: int
    slots: Slots | None = None
    carried: Tensor | None = None
    load: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.load = self.by_expert(self.plan.selected)

    def over_ranks(self) -> "Routing":
        """This routing with `load`, sums and means over the tokens of all ranks, which all must call."""
        return attrs.evolve(self, tokens=attrs.evolve(self.tokens, summed=True))

    def by_expert(self, values_N: Tensor) -> Tensor:
        """[E]: values [N] of assignments, summed at their experts."""
        return self.total(count_by(self.plan.expert, values_N, self.experts))

    def total(self, own: Tensor) -> Tensor:
        """A sum over this rank's tokens or sequences, added up over the ranks that a loss sees."""
        return self.tokens.total(own)

    @property
    def smooth_load(self) -> Tensor | None:
        """[E]: the expected load over the router's noise, attached to the graph; None for a router without noise."""
        return None if self.plan.chances is None else self.tokens.sum(self.plan.chances())

    @property
    def work(self) -> Tensor:
        """Number of tokens or slots that experts process, without padding and groups that are all padding."""
        if self.slots is None:
            return self.plan.kept.sum()
        return (self.slots.dispatch.detach().sum((1, 2, 3)) > 0).sum() * self.slots.each

    @property
    def dropped(self) -> Tensor:
        """[E]: assignments that capacity dropped."""
        if self.plan.kept is self.plan.selected:
            return torch.zeros_like(self.load)
        return self.by_expert(self.plan.dropped)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over real tokens of values [T] or [T, n]."""
        return self.tokens.mean(values)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over real tokens of values [T] or [T, n]."""
        return self.tokens.sum(values)

    def _scattered(self, value_N: Tensor) -> Tensor:
        """[T, E]: value_N summed at its token and expert."""
        zeros = torch.zeros(self.tokens.x.shape[0], self.experts, dtype=value_N.dtype, device=value_N.device)
        return zeros.index_put((self.plan.token, self.plan.expert), value_N, accumulate=True)

    def gates(self) -> Tensor:
        """[T, E]: each expert's gate, 0 if it was not chosen. Attached to the graph."""
        return self._scattered(torch.where(self.plan.kept, self.plan.weight, 0))

    def chosen(self) -> Tensor:
        """[T, E]: 1 where a real token chose the expert, before capacity drops any."""
        return self._scattered(at_least_fp32(self.plan.selected))

    def per_sequence(self, values_TE: Tensor) -> Tensor:
        """values_TE [T, n] as [B, S, n]; a layer called with [T, D] was given one sequence."""
        *batch, length = self.tokens.shape or (1,)
        return values_TE.view(math.prod(batch), length, values_TE.shape[-1])


def keep_best_groups(level: Level, by_TE: Tensor, groups: int, kept: int, best: int) -> Tensor:
    """Group-limited selection: -inf outside the `kept` best of `groups` equal groups of experts.

    by_TE: what `level.select_by` returned. A group's score is the sum of its `best` largest scores, in float64; equal
    groups are parted like equal experts. The mask is -inf rather than 0, which would beat negative scores. Check with
    `groups_problem` first.
    """
    count, experts = by_TE.shape
    grouped = by_TE.view(count, groups, experts // groups)
    sum_TG = grouped.float().to(by_TE.dtype).topk(best, dim=-1).values.sum(-1)  # of the scores, unparted
    by_lot_TG = level.part_ties(torch.zeros_like(sum_TG), draw=1).argsort(dim=-1, descending=True)
    best_TG = sum_TG.gather(-1, by_lot_TG).argsort(dim=-1, descending=True, stable=True)
    open_TG = by_lot_TG.gather(-1, best_TG)[:, :kept]
    closed = torch.ones(count, groups, dtype=torch.bool, device=by_TE.device).scatter(1, open_TG, False)
    return grouped.masked_fill(closed[..., None], -torch.inf).view(count, experts)


def causal_problem(spec: Any, router: str, allowed: bool) -> str | None:
    """Why a router whose choices depend on other tokens can't be used in a causal layer, or None if it can."""
    if not spec.causal or allowed:
        return None
    return (
        f"{router} routes a token by later tokens, which a causal layer must not see; "
        f"choose another router, or set {router}.allow_noncausal to measure the difference"
    )


def groups_problem(spec: Any, groups: int, kept: int, equal: bool = True) -> str | None:
    """Why a token can't choose K experts in the best `kept` of these groups, or None. equal: all of one size."""
    if equal and spec.experts % groups:
        return f"groups={groups} does not divide {spec.experts} experts"
    if kept > groups:
        return f"groups_kept={kept} is more than groups={groups}"
    if spec.top_k % kept:
        return f"top_k={spec.top_k} is not a multiple of groups_kept={kept}"
    if kept * (spec.experts // groups) < spec.top_k:
        return f"groups_kept={kept} of {groups} groups hold fewer than top_k={spec.top_k} experts"
    return None
