"""The layer: score -> biases -> selection -> capacity -> dispatch -> experts -> combine."""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.numerics import without_autocast
from ..contract.options import Settings
from ..contract.parts import Bias, Experts, Part, Router
from ..contract.routing import Assignments, Level, Routing, Slots, Spec, Tokens, assign
from ..contract.setup import Bound
from ..errors import UsageError
from ..optimizer_state import forget_old_shapes
from .capacity import within_capacity
from .dense import shared_expert
from .dispatch import dispatch
from .ledger import Ledger, invalidate

Layout = dict[str, torch.Size]  # what a flat vector of sums holds, in order


class MoE(nn.Module):
    """A Mixture-of-Experts layer. `Engine.moe()` builds it; its parts come from plugins.

    Called with x [..., D] and, each of x's leading shape or None: mask (bool, True = a real token),
    ids (token ids), labels (class or domain). Answers [..., out], 0 at padding and for a token whose
    every assignment capacity dropped.
    """

    def __init__(
        self,
        spec: Spec,
        router: Router,
        biases: Sequence[Mapping[str, Bias]],
        experts: Experts,
        states: Mapping[str, Part],
        losses: Sequence[Bound],
        measures: Sequence[Bound],
        weights: Mapping[str, float],
        settings: Settings,
        name: str,
    ) -> None:
        super().__init__()
        self.spec, self.settings, self.name = spec, settings, name
        self.copy_id = ""
        self.new_copy_id()
        self.router = router
        self.biases = nn.ModuleList(nn.ModuleDict(dict(level)) for level in biases)
        self.experts = experts
        self.shared = shared_expert(spec)
        self.states = nn.ModuleDict(dict(states))
        self.losses, self.measures, self.weights = tuple(losses), tuple(measures), dict(weights)
        self.watched: list[Routing] | None = None  # a probe collects routings here
        self.layout: Layout = {}  # sums of every forward; in training, more: `training_layout`
        self.training_layout: Layout = {}
        self.signal_sizes: dict[tuple[int, str], int] = {}
        self.train_sums: Tensor | None = None  # sums of the steps since the last log point, by training_layout
        self.load_since_growth: Tensor | None = None  # [E]: load since the last growth, where a trigger asks for it
        self.last_terms: dict[str, Tensor] = {}  # the loss terms of the last step
        for level, own in zip(router.levels, biases, strict=True):
            for bias in own.values():  # a bias declares the units of its level, whatever they are
                bias.axes = {
                    tensor: attrs.evolve(axis, of=level.name) if axis.of == "expert" else axis
                    for tensor, axis in bias.axes.items()
                }
        self.sizes = self._sizes()
        if self.sizes["expert"] != spec.experts:
            raise UsageError(f"layer '{name}': its parts are for {self.sizes['expert']} experts, not {spec.experts}")
        self._rehearse()
        self._reset_sums()
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    step_sums: Tensor
    seen: Tensor
    aux_value: Tensor
    aux_scale: Tensor

    # -- the forward ---------------------------------------------------------------------------

    def forward(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        tokens = self.tokens(x, mask, ids, labels)
        routing = self.route(tokens)
        y_TO = dispatch(self.experts, routing, self.spec.out_dim)
        if self.shared is not None:
            y_TO = y_TO + tokens.real(self.shared(tokens.x))
        if self.watched is not None:
            self.watched.append(routing)
        elif self.training:
            y_TO = self._enter(y_TO, routing)
        else:
            self.eval_sums.add_(_flat(self.measure(routing), self.layout).to(self.eval_sums.dtype))
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return y_TO.to(dtype).view(*x.shape[:-1], self.spec.out_dim)

    def tokens(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None, labels: Tensor | None = None
    ) -> Tokens:
        """The forward's arguments, checked and flattened, padding set to 0."""
        if x.shape[-1] != self.spec.dim:
            raise ValueError(f"layer '{self.name}' takes [..., {self.spec.dim}], not {list(x.shape)}")
        for word, value in (("mask", mask), ("ids", ids), ("labels", labels)):
            if value is not None and value.shape != x.shape[:-1]:
                raise ValueError(
                    f"layer '{self.name}': {word} is {list(value.shape)}, the tokens are {list(x.shape[:-1])}"
                )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"layer '{self.name}': mask is {mask.dtype}; it must be bool, True = a real token")
        tokens = Tokens(x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1]), None if mask is None else mask.reshape(-1))
        tokens.x = tokens.real(tokens.x)  # even NaN at a pad must reach nobody
        tokens.ids = None if ids is None else tokens.real(ids.reshape(-1))
        tokens.labels = None if labels is None else tokens.real(labels.reshape(-1))
        return tokens

    def route(self, tokens: Tokens, without: str | None = None) -> Routing:
        """Decide where tokens go; `without`: leave one plugin's biases out."""
        with without_autocast(tokens.x.device):
            return self.decide(tokens, self.router.score(tokens), without)

    def decide(self, tokens: Tokens, logits: Sequence[Tensor], without: str | None = None) -> Routing:
        """The part of `route` after the scores: logits, one [T, n] a level."""
        levels = []
        for level, raw_Tn, biases in zip(self.router.levels, logits, self.biases, strict=True):
            biased_Tn, selection_n = raw_Tn, None
            for name, bias in biases.items():  # type: ignore[operator]
                if name == without:
                    continue
                if bias.selection_only:
                    selection_n = bias() if selection_n is None else selection_n + bias()
                else:
                    biased_Tn = biased_Tn + bias()
            levels.append(Level(level.name, raw_Tn, biased_Tn, selection_n))
        probs_TE, plan = self.router.select(tokens, tuple(levels))
        slots = plan if isinstance(plan, Slots) else None
        if isinstance(plan, Slots):
            plan = assign(tokens.x.new_empty(0, 1), tokens.x.new_empty(0, 1, dtype=torch.long), tokens)
        if self.spec.capacity is not None and self.training:
            plan = within_capacity(plan, self.spec, tokens)
        return Routing(tokens, tuple(levels), probs_TE, plan, self.spec.experts, self.spec.top_k, slots)

    # -- sums ------------------------------------------------------------------------------------

    def measure(self, routing: Routing) -> dict[str, Tensor]:
        """The sums of one forward by name, as `Stats` describes them."""
        return {**sums_of(routing), **measured(routing, self.measures, self)}

    def aux_terms(self, routing: Routing) -> dict[str, Tensor]:
        """Every loss term of one forward, unweighted: "plugin", or "plugin.key" where it answers several."""
        terms: dict[str, Tensor] = {}
        for bound in self.losses:
            answer = bound({"routing": routing, "layer": self, "state": self.state_of(bound.plugin)})
            named = answer if isinstance(answer, Mapping) else {"": answer}
            terms.update({f"{bound.plugin}.{key}" if key else bound.plugin: value for key, value in named.items()})
        return terms

    def weight_of(self, term: str) -> float:
        """The coefficient of a loss term: its plugin's option `weight`."""
        return self.weights[term.partition(".")[0]]

    def state_of(self, plugin: str) -> Any:
        """The plugin's own state in this layer, or None."""
        return self.states[plugin] if plugin in self.states else None  # noqa: SIM401 (no ModuleDict.get)

    def _bias_sums(self, routing: Routing) -> dict[str, Tensor]:
        return {
            f"{level.name}/{name}/{key}": value.detach()
            for level, biases in zip(routing.levels, self.biases, strict=True)
            for name, bias in biases.items()  # type: ignore[operator]
            for key, value in bias.measure(level, routing.tokens).items()
        }

    def _enter(self, y_TO: Tensor, routing: Routing) -> Tensor:
        """Pass a training forward's output through the ledger."""
        with without_autocast(y_TO.device):
            terms = self.aux_terms(routing)
            flat = self.training_sums(routing, terms)
            aux = None
            for name, value in terms.items():
                term = self.weight_of(name) * value
                aux = term if aux is None else aux + term
        if aux is not None:
            self.aux_value.add_(aux.detach())
        plan = routing.plan
        routed: tuple[Any, ...] = (None, None, None, None)
        if self.signal_sizes:
            weight_N = torch.where(plan.kept, plan.weight.detach(), 0)
            routed = plan.token, plan.expert, weight_N, self._signals
        entered: Tensor = Ledger.apply(y_TO, self.step_sums, flat, aux, self.aux_scale, *routed)
        return entered

    def training_sums(self, routing: Routing, terms: Mapping[str, Tensor]) -> Tensor:
        """What a training forward with these loss terms enters into the step's sums, by `training_layout`."""
        some = routing.tokens.count > 0  # a forward without a token is no data
        sums = {**self.measure(routing), "forwards": some, **self._bias_sums(routing)}
        sums.update({f"loss.{name}": value.detach() for name, value in terms.items()})
        return _flat(sums, self.training_layout)

    def _signals(self, grad_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        found = []
        for index, name in self.signal_sizes:
            unit_of = self.router.unit_of_expert(self.router.levels[index].name)
            unit_N = expert_N if unit_of is None else unit_of[expert_N]
            bias = self.biases[index][name]  # type: ignore[index]
            found.append(bias.signal(grad_TD, token_N, unit_N, weight_N).float().view(-1))
        return torch.cat(found)

    def step_load(self, routing: Routing) -> Tensor:
        """[E]: a forward's load and what this process's backwards of this step have counted so far.

        A forward that is recomputed in its own backward gets the same answer again.
        """
        booked = self.step_sums.grad if hasattr(self, "step_sums") else None  # there is none in the first rehearsal
        if booked is None:
            return routing.load
        return routing.load + unflat(booked.detach(), self.training_layout)["load"]

    # -- building --------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Run four tokens through, so that a mix that makes no sense fails here, with the plugin's name."""
        spec, some = self.spec, next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        device = some.device
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            zeros = torch.zeros(4, dtype=torch.long, device=device)
            tokens = self.tokens(
                torch.randn(4, spec.dim).to(some),
                ids=zeros if spec.vocab else None,
                labels=zeros if spec.classes else None,
            )
            routing = self.route(tokens)
            _check_plan(self.name, routing.plan)
            sums, terms, own = self.measure(routing), self.aux_terms(routing), self._bias_sums(routing)
        if not hasattr(self, "step_sums"):  # a built layer may be frozen since
            _check_terms(self.name, terms)
        self.layout = {name: value.shape for name, value in sums.items()}
        one = torch.Size([1])
        self.training_layout = {**self.layout, "forwards": one, **{name: value.shape for name, value in own.items()}}
        self.training_layout |= {f"loss.{name}": one for name in terms}
        self.signal_sizes = {
            (index, name): level.size
            for index, (level, biases) in enumerate(zip(self.router.levels, self.biases, strict=True))
            for name, bias in biases.items()  # type: ignore[operator]
            if bias.wants_signal
        }
        self._rehearse_experts(routing)

    @torch.no_grad()
    def _rehearse_experts(self, routing: Routing) -> None:
        """The same for experts and signals, which leaves running statistics of the experts' modules alone."""
        plan = routing.plan
        training = [module for module in self.experts.modules() if module.training]
        self.experts.eval()
        y_TO = dispatch(self.experts, routing, self.spec.out_dim)
        for module in training:
            module.training = True
        if self.signal_sizes:
            found = self._signals(torch.zeros_like(y_TO), plan.token, plan.expert, plan.weight)
            if found.shape[0] != sum(self.signal_sizes.values()):
                raise UsageError(f"layer '{self.name}': a bias's signal is not one number for each unit of its level")

    def _reset_sums(self) -> None:
        """The leaf whose gradient is the step's sums, and its companions; fp32 whatever the layer is cast to."""
        device = next(self.parameters(), torch.empty(0)).device
        size = numel(self.training_layout) + sum(self.signal_sizes.values())
        fp32: Any = {"dtype": torch.float32, "device": device}
        self.register_buffer("step_sums", torch.zeros(size, requires_grad=True, **fp32), persistent=False)
        self.register_buffer("aux_value", torch.zeros((), **fp32), persistent=False)
        self.register_buffer("aux_scale", torch.zeros((), **fp32), persistent=False)
        # no buffer, because DDP would overwrite it with the first process's; fp32 would stop counting at 2^24
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.eval_sums = torch.zeros(numel(self.layout), dtype=wide, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> "MoE":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        seen = self.eval_sums
        self._reset_sums()
        self.eval_sums.copy_(seen)
        return self

    # -- growing ---------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part by its place: "router", "experts", "biases.0.NAME", "states.NAME"."""
        for where, module in self.named_modules():
            if isinstance(module, Part):
                yield where, module

    def _sizes(self, given: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """The size of each population, on which all parts must agree; given: tensors in the place of some of theirs."""
        found: dict[str, tuple[int, str]] = {}
        for where, part in self.parts():
            for name, axis in part.axes.items():
                tensor = (given or {}).get(f"{where}.{name}", getattr(part, name))
                size = tensor.shape[axis.axis] if tensor.dim() > axis.axis else -1
                first, who = found.setdefault(axis.of, (size, f"{where}.{name}"))
                if size != first:
                    odd = f"{where}.{name} is for {size} units of '{axis.of}', {who} for {first}"
                    raise UsageError(f"layer '{self.name}': {odd}")
        return {"expert": self.spec.experts, **{of: size for of, (size, _) in found.items()}}

    def new_copy_id(self) -> None:
        """Take a name of its own that copies from now on share, so that growth finds them."""
        self.copy_id = uuid.uuid4().hex

    def refit(self) -> None:
        """Take over the sizes that the tensors of the parts have now. Sums so far are dropped."""
        self.sizes = self._sizes()
        self.spec = attrs.evolve(self.spec, experts=self.sizes["expert"])
        self.train_sums = self.load_since_growth = None
        self._rehearse()
        self._reset_sums()

    def sums(self) -> dict[str, Tensor | None]:
        """What was counted and not yet asked for, as copies."""
        held = {"train_sums": self.train_sums, "load_since_growth": self.load_since_growth, "eval_sums": self.eval_sums}
        return {name: None if value is None else value.clone() for name, value in held.items()}

    def check_sums(self, sums: Mapping[str, Tensor | None]) -> None:
        """Raise UsageError if what `sums` answered is of another layer, or of this one with other plugins."""
        sizes = {
            "train_sums": numel(self.training_layout),
            "load_since_growth": self.spec.experts,
            "eval_sums": numel(self.layout),
        }
        for name, size in sizes.items():
            value = sums[name]
            if value is not None and value.numel() != size:
                raise UsageError(
                    f"the state of layer '{self.name}' is of other plugins or experts; load the model before it"
                )

    def take_sums(self, sums: Mapping[str, Tensor | None]) -> None:
        """Go on from what `sums` answered."""
        for name in ("train_sums", "load_since_growth", "eval_sums"):
            value = sums[name]
            setattr(self, name, None if value is None else value.to(self.eval_sums, copy=True))

    def bias_levels(self) -> list[dict[str, Bias]]:
        """The biases of each level by plugin, in the order typed."""
        return [dict(level.items()) for level in self.biases]  # type: ignore[operator]

    def parts_of_plugins(self) -> dict[str, Part]:
        """The plugins' own states in this layer."""
        return dict(self.states.items())  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.dim} -> {spec.out_dim}, experts={spec.experts}, top_k={spec.top_k}"


def sums_of(routing: Routing) -> dict[str, Tensor]:
    """What is counted of every forward: tokens, load, dropped; prob and slots where the router has such."""
    tokens = routing.tokens
    sums = {"tokens": tokens.count.view(1), "load": routing.load, "dropped": routing.dropped}
    if routing.probs is not None:
        sums["prob"] = tokens.real(routing.probs.detach()).sum(0)
    if routing.slots is not None:
        sums["slots"] = torch.stack([routing.work, tokens.count * routing.slots.each])
    return sums


def measured(routing: Routing, measures: Iterable[Bound], layer: Any) -> dict[str, Tensor]:
    """What plugins measure of one forward, as "PLUGIN.NAME"; layer: a MoE, or what stands for it."""
    sums: dict[str, Tensor] = {}
    for bound in measures:
        answer = bound({"routing": routing, "layer": layer, "state": layer.state_of(bound.plugin)})
        if not isinstance(answer, Mapping) or not all(isinstance(value, Tensor) for value in answer.values()):
            raise UsageError(
                f"layer '{layer.name}': moe_measure of '{bound.plugin}' answers {answer!r}, not tensors by name"
            )
        sums.update({f"{bound.plugin}.{name}": value.detach() for name, value in answer.items()})
    return sums


def _flat(sums: Mapping[str, Tensor], layout: Layout) -> Tensor:
    if sums.keys() != layout.keys():
        changed = sorted(sums.keys() ^ layout.keys())
        raise ValueError(f"measured names must be the same in every forward; {changed} came or went")
    return torch.cat([value.reshape(-1) for value in sums.values()]).float()


def unflat(flat: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Sums by name out of the flat vector of a layout."""
    sums, start = {}, 0
    for name, shape in layout.items():
        sums[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return sums


def numel(layout: Layout) -> int:
    """The length of the flat vector of a layout."""
    return sum(shape.numel() for shape in layout.values())


def _before_load(layer: MoE, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse what can't be of this layer at any number of experts, before anything has changed. Raises UsageError."""
    given = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
    sizes = layer._sizes(given)
    if sizes == layer.sizes:
        return
    attrs.evolve(layer.spec, experts=sizes["expert"])
    for where, part in layer.parts():
        own = {name: given[f"{where}.{name}"].clone() for name in part.axes if f"{where}.{name}" in given}
        if own:
            part.adjust_rows(own, {})


def _after_load(layer: MoE, _: Any) -> None:
    """The tensors that were loaded may be of another number of experts."""
    if layer._sizes() != layer.sizes:
        old = layer.step_sums
        old.grad = None  # counts of experts that are gone
        layer.refit()
        invalidate(old)
        forget_old_shapes(layer.parameters())


def _check_plan(name: str, plan: Any) -> None:
    if not isinstance(plan, Assignments):
        raise UsageError(f"layer '{name}': its router's select answered {type(plan).__name__}, not Assignments")


def _check_terms(name: str, terms: Mapping[str, Any]) -> None:
    for term, value in terms.items():
        if not isinstance(value, Tensor):
            why = f"is {value!r}, not a tensor"
        elif value.dim():
            why = f"is of shape {list(value.shape)}, not a scalar; take a mean, say routing.mean(...)"
        elif not value.requires_grad:
            why = "does not depend on the router; it can teach this router nothing"
        else:
            continue
        raise UsageError(f"layer '{name}': loss '{term}' {why}")
