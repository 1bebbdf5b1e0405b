"""Parts of a layer: modules whose tensors declare their expert axis.

From that declaration the engine can add and remove experts, with their optimizer state, and load a checkpoint with
another number of experts. Never define a part with attrs: one validated field on an nn.Module hides all parameters.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..processes import full_tensor
from .numerics import at_least_fp32, rows_of
from .routing import Assignments, Level, LevelSpec, Tokens, keep_best_groups

if TYPE_CHECKING:
    from .growth import Plan
    from .stats import Step

Fresh = Callable[..., Tensor]  # (shape, generator=None) -> a newly drawn tensor
Role = Literal["in", "output", "logit_row", "logit_bias", "state"]


@attrs.frozen
class Axis:
    """A tensor's declaration of its expert axis.

    axis: the dimension. of: the population along it, "expert" or the name of a router's level. role: the tensor's
    function. fresh: draws a new unit's row from (shape, generator). new: the initial value of a new unit's row in a
    buffer: "parent", "mean", "zero" or a number. values: the population whose units the tensor's integers index.
    """

    axis: int = 0
    of: str = "expert"
    role: Role = "state"
    fresh: Fresh | None = None
    new: str | float = "parent"
    values: str | None = None


class Part(nn.Module):
    """One part of a layer, with its tensors. `.to()` keeps floating-point buffers in fp32 or better.

    Read sizes from the tensors and never store them: growth changes them.
    wants_expert_grad: `after_step` needs `step.expert_grad`.
    """

    wants_expert_grad: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, Axis] = {}

    @property
    def home(self) -> nn.Module:
        """The module under which its tensors are registered: itself, or the one that it borrows them from."""
        return self

    def expert_param(
        self, name: str, shape: tuple[int, ...], *, fresh: Fresh, role: Role, axis: int = 0, of: str = "expert"
    ) -> None:
        """Register a parameter with an expert axis. fresh(shape) draws it, and later each new unit's row.

        Raises ValueError for an unknown role.
        """
        if role not in get_args(Role):
            raise ValueError(f"a tensor's role is one of {', '.join(get_args(Role))}, not {role!r}")
        self.register_parameter(name, nn.Parameter(fresh(shape)))
        self.axes[name] = Axis(axis, of, role, fresh)

    def expert_buffer(
        self,
        name: str,
        tensor: Tensor,
        *,
        axis: int = 0,
        new: str | float = "parent",
        of: str = "expert",
        values: str | None = None,
    ) -> None:
        """Register a saved buffer with an expert axis."""
        if isinstance(new, str) and new not in ("parent", "mean", "zero"):
            raise ValueError(f"new must be 'parent', 'mean', 'zero' or a number, not {new!r}")
        self.register_buffer(name, at_least_fp32(tensor) if tensor.is_floating_point() else tensor)
        self.axes[name] = Axis(axis, of, "state", None, new, values)

    def adjust_rows(self, staged: dict[str, Tensor], plans: Mapping[str, "Plan"]) -> None:
        """Change staged tensors in place if rows are coupled; called during a growth, before it is committed.

        staged: this part's new tensors by name. plans: the origin of each unit, by population; empty when a
        checkpoint of another size is loaded. Integers that index a removed unit are -1. Raises UsageError if
        the part can't grow this way.
        """

    def holder(self, name: str) -> tuple[nn.Module, str]:
        """(the module that registers a declared tensor, its name there): this part, unless the tensor is borrowed."""
        return self, name

    def put(self, name: str, value: Tensor) -> None:
        """Set a declared tensor to a value of any size. A parameter remains the same object."""
        module, own = self.holder(name)
        parameter = module._parameters.get(own)
        if parameter is None:
            module._buffers[own] = value
            return
        # A detour through another dtype makes autograd drop its gradient accumulator of the old shape, which a
        # loss that is still referenced keeps alive.
        other = torch.float32 if value.dtype == torch.float16 else torch.float16
        parameter.data = torch.empty(0, dtype=other, device=value.device)
        parameter.data = value
        if parameter.grad is not None and parameter.grad.shape != value.shape:
            parameter.grad = None

    def after_step(self, step: "Step") -> None:
        """Update the state; called once per optimizer step that was not skipped, under no_grad."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Part":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self.get_buffer(name)
            if old.is_floating_point() and new.element_size() < old.element_size():
                setattr(self, name, old.to(new.device))  # a step of 1e-3 is lost in bf16
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Adopt the loaded size: a checkpoint may hold another number of experts."""
        for name, axis in self.axes.items():
            live, given = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dim() == live.dim() and given.shape != live.shape:
                shape = list(live.shape)
                shape[axis.axis] = given.shape[axis.axis]
                if shape == list(given.shape):
                    self.put(name, live.new_zeros(shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Router(Part):
    """Scores tokens and decides where they go.

    keeps_function: effects of initializers (keys of `EFFECTS`) with which growth leaves the layer's output unchanged.
    carries: the width C of what it passes on from layer to layer, 0 for nothing. A router that carries reads
    `tokens.carried` [T, C], and its `score` returns (logits, what the next layer's router is handed [T, C]).
    """

    keeps_function: tuple[str, ...] = ()
    carries: int = 0

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        """The levels from coarse to fine, derived from the tensors; empty for a router without logits."""
        raise NotImplementedError

    def score(self, tokens: Tokens) -> Any:
        """Raw logits, one [T, n] per level, in fp32 or better. Called with autocast off."""
        raise NotImplementedError

    def select(self, tokens: Tokens, levels: tuple[Level, ...]) -> tuple[Tensor | None, Assignments]:
        """(probs [T, E] or None, the assignments). Take the top-K of `level.select_by(scores)`."""
        raise NotImplementedError

    def unit_of_expert(self, level: str) -> Tensor | None:
        """[E]: the unit of this level that each expert belongs to; None if the units are the experts."""
        return None

    def competes_in(self, level: str) -> Tensor | None:
        """[n]: the group within which each unit of this level competes; None if all compete with all."""
        return None


class LinearRouter(Router):
    """A router with one row of weights per expert: logits = x W^T. weight [E, D]."""

    def __init__(self, spec: Any, fresh: Fresh | None = None) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.expert_param("weight", (spec.experts, spec.dim), fresh=fresh or uniform(spec.dim), role="logit_row")

    weight: Tensor

    @property
    def count(self) -> int:
        """E."""
        return self.weight.shape[self.axes["weight"].axis]

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        return (LevelSpec("expert", self.count, self.top_k),)

    def score(self, tokens: Tokens) -> tuple[Tensor, ...]:
        return (self.linear(tokens),)

    def linear(self, tokens: Tokens) -> Tensor:
        """[T, E]: x W^T."""
        return linear_logits(tokens.x, self.weight)


class GroupLimitedRouter(LinearRouter):
    """A linear router whose tokens choose within the best `groups_kept` of `groups` equal groups of experts.

    group_score: a group's score, the sum of its best K / groups_kept scores ("sum"), of its best two ("top2", as
    DeepSeek-V3, 2024), or its best one ("max", as DeepSeek-V2, 2024).
    """

    def __init__(self, spec: Any, groups: int, groups_kept: int, group_score: str = "sum") -> None:
        super().__init__(spec)
        self.groups, self.groups_kept = groups, groups_kept
        best = {"sum": spec.top_k // groups_kept, "top2": min(2, spec.experts // groups), "max": 1}
        self.best_of_group = best[group_score]

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        return (LevelSpec("expert", self.count, self.top_k, limited=self.groups > 1),)

    def select_by(self, level: Level, scores_TE: Tensor) -> Tensor:
        """`level.select_by(scores_TE)`, with -inf outside each token's best groups."""
        by_TE = level.select_by(scores_TE)
        if self.groups == 1:
            return by_TE
        return keep_best_groups(level, by_TE, self.groups, self.groups_kept, self.best_of_group)

    def adjust_rows(self, staged: dict[str, Tensor], plans: Mapping[str, "Plan"]) -> None:
        if self.groups > 1 and staged.get("weight", self.weight).shape != self.weight.shape:
            message = "the router's groups are cut by position, so growth would cut them differently; use groups=1"
            raise UsageError(message, code="groups-cannot-grow")


class Bias(Part):
    """Shifts the scores of one level.

    selection_only: gates do not see it. wants_signal: call `signal` in each backward.
    """

    selection_only: bool = True
    wants_signal: bool = False

    def forward(self) -> Tensor:
        """[n]: the current bias."""
        raise NotImplementedError

    def measure(self, level: Level, tokens: Tokens) -> Mapping[str, Tensor]:
        """Tensors by name, which are summed over the step's forwards; `step.own` holds the sums."""
        return {}

    def signal(self, grad_TD: Tensor, token_N: Tensor, unit_N: Tensor, weight_N: Tensor) -> Tensor:
        """[n], computed in backward from dL/dy and the assignments (weight 0 = dropped or padding)."""
        raise NotImplementedError


def ema_update_(mean: Tensor, value: Tensor, decay: float) -> None:
    """mean <- decay mean + (1 - decay) value, in place; a value of all zeros (a step without data) moves nothing."""
    mean.lerp_(value.to(mean.dtype), (1 - decay) * (value.sum() > 0).to(mean.dtype))


class RunningLoad(Part):
    """A state for triggers: `value` [E], the running mean over steps of each expert's load relative to the mean.

    It starts at 1, for new experts too, and a step without data does not change it.
    """

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.expert_buffer("value", torch.ones(size), new=1.0)

    value: Tensor

    def after_step(self, step: "Step") -> None:
        ema_update_(self.value, step.relative(step.load), self.decay)


class Experts(Part):
    """A bank of experts. One that declares no expert axis must define `outputs` and `expert_grad` itself.

    exchange: how rows reach experts of other ranks, (bank, x_ND, counts_E) -> [N, out]; None if all are here.
    """

    exchange: Callable[["Experts", Tensor, Tensor], Tensor] | None = None

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """[N, out]: rows sorted by expert, counts_E[e] rows each; rows past the counts' sum come back as 0."""
        raise NotImplementedError

    def routed(self, x_TD: Tensor, plan: Assignments, experts: int) -> Tensor:
        """[T, out] in fp32 or better: for each token the sum over its kept assignments of weight times output."""
        expert_N = torch.where(plan.kept, plan.expert, experts)  # dropped assignments are sorted to the end
        order_N = torch.argsort(expert_N, stable=True)
        counts_E = rows_of(expert_N, experts + 1)[:experts]
        token_N, weight_N = plan.token.index_select(0, order_N), plan.weight.index_select(0, order_N)
        if self.exchange is None:
            return self.combined(x_TD, token_N, weight_N, counts_E)
        return Experts.combined(self, x_TD, token_N, weight_N, counts_E)

    def combined(self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, counts_E: Tensor) -> Tensor:
        """[T, out] in fp32 or better: for each token the sum over its rows of weight times its expert's output.

        token_N, weight_N: of rows sorted by expert; rows past the counts' sum are ignored, whatever their weight.
        """
        enters_N = torch.arange(token_N.shape[0], device=token_N.device) < counts_E.sum()
        weight_N = torch.where(enters_N, weight_N, 0)
        return combine(self.rows(x_TD.index_select(0, token_N), counts_E), token_N, weight_N, x_TD.shape[0])

    def rows(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What `forward` returns, of experts on any rank."""
        out_NO: Tensor = self(x_ND, counts_E) if self.exchange is None else self.exchange(self, x_ND, counts_E)
        return out_NO

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """That of the layer's output: autocast's, or that of its input."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def outputs(self, x_SD: Tensor) -> Tensor:
        """[E, S, out]: the outputs of every expert for the same few tokens."""
        name, axis = next(iter(self.axes.items()))
        experts, tokens = getattr(self, name).shape[axis.axis], x_SD.shape[0]
        counts_E = torch.full((experts,), tokens, device=x_SD.device)
        out_ESO: Tensor = self(x_SD.repeat(experts, 1), counts_E).unflatten(0, (experts, tokens))
        return out_ESO

    def expert_grad(self) -> Tensor:
        """[E]: mean |gradient| of each expert's weights, averaged over its tensors; no gradient counts as 0."""
        tensors = [(getattr(self, name), axis.axis) for name, axis in self.axes.items()]
        declared = [(tensor, axis) for tensor, axis in tensors if isinstance(tensor, nn.Parameter)]
        return torch.stack([mean_grad(parameter, keep=axis) for parameter, axis in declared]).mean(0)


def combine(out_NO: Tensor, token_N: Tensor, weight_N: Tensor, tokens: int) -> Tensor:
    """[T, out]: the sum over each token's rows of weight times output, in the precision of the weights."""
    y_TO = torch.zeros(tokens, out_NO.shape[1], dtype=weight_N.dtype, device=out_NO.device)
    return y_TO.index_add(0, token_N, at_least_fp32(out_NO).to(weight_N.dtype) * weight_N[:, None])


def mean_grad(parameter: Tensor, keep: int | None = None) -> Tensor:
    """Mean |gradient| over all dimensions except `keep`, in fp32 or better; 0 without a gradient."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    size = at_least_fp32(full_tensor(grad.detach())).abs()
    return size.mean() if keep is None else size.movedim(keep, 0).reshape(size.shape[keep], -1).mean(1)


def uniform(fan_in: int) -> Fresh:
    """A `fresh` that draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear does."""
    return partial(_uniform, fan_in**-0.5)


def _uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def zeros(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """A `fresh` that returns zeros."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """A `fresh` that returns ones, the initial value of gains."""
    return torch.ones(shape)


def linear_logits(x_TD: Tensor, weight_nD: Tensor) -> Tensor:
    """x W^T in fp32 or better, whatever the precision of x and W: bf16 logits tie and flip choices."""
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight_nD.dtype), torch.float32)
    return x_TD.to(dtype) @ weight_nD.to(dtype).t()
