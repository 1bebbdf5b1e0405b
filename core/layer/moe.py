"""The layer: score -> biases -> selection -> capacity -> dispatch -> experts -> combine."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.numerics import at_least_fp32, count_by, without_autocast
from ..contract.options import Settings
from ..contract.parts import Bias, Experts, Part, Router
from ..contract.routing import Routing, Slots, Spec, Tokens, assign
from ..contract.setup import Bound
from ..errors import UsageError
from ..optimizer_state import forget_old_shapes
from ..processes import all_reduce_sum, distributed, of_mean_over_ranks
from .build_checks import check_plan, check_terms, drawn, output_of
from .capacity import within_capacity
from .dense import shared_expert
from .dispatch import dispatch
from .ledger import Ledger, invalidate
from .scores import Column, biased_level, carried_by, tokens_of
from .sums import LayerSums, flat, layouts_of, measured, sums_of, unflat


class MoE(nn.Module):
    """A Mixture-of-Experts layer. `Engine.moe()` builds it; its parts come from plugins.

    Called with x [..., D] and, each with x's leading shape or None: mask (bool, True is a real token), ids (token
    ids), labels (class or domain). Returns [..., out], which is 0 at padding and for tokens of which capacity
    dropped every assignment. If the router carries C values per token from layer to layer, it is called with
    carried [..., C], None in the first layer, and returns (output, carried) for the next. Hooks see it as a `Layer`.
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
        self.copy_id = new_copy_id()
        self.router = router
        self.biases = nn.ModuleList(nn.ModuleDict(dict(level)) for level in biases)
        self.experts = experts
        self.shared = shared_expert(spec)
        self.states = nn.ModuleDict(dict(states))
        self.losses, self.measures, self.weights = tuple(losses), tuple(measures), dict(weights)
        self.watched: list[Routing] | None = None  # a probe collects routings here
        for level, by_plugin in zip(router.levels, biases, strict=True):
            for bias in by_plugin.values():  # a bias declares the units of its level, whatever they are
                bias.axes = {
                    tensor: attrs.evolve(axis, of=level.name) if axis.of == "expert" else axis
                    for tensor, axis in bias.axes.items()
                }
        self.sizes = _sizes_of(self)
        if self.sizes["expert"] != spec.experts:
            message = f"layer '{name}': its parts are for {self.sizes['expert']} experts, not {spec.experts}"
            raise UsageError(message, code="sizes-disagree")
        self.sums = self._rehearse(first=True)
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    sums: LayerSums

    # -- the forward ---------------------------------------------------------------------------

    def forward(
        self, x: Tensor, mask: Column = None, ids: Column = None, labels: Column = None, carried: Column = None
    ) -> Any:
        self.sums.move(x.device)  # a model materialised from the meta device moved only parameters and buffers
        tokens = self.tokens(x, mask, ids, labels, carried)
        routing = self.route(tokens)
        y_TO = dispatch(self.experts, routing, self.spec.out_dim)
        if self.shared is not None:
            y_TO = y_TO + tokens.real(self.shared(tokens.x))
        if self.watched is not None:
            self.watched.append(routing)
        elif self.training:
            y_TO = self._attach_ledger(y_TO, routing)
        else:
            self.sums.add_evaluated(self.measure(routing))
        y, carried = y_TO.to(self.experts.output_dtype(x)).view(*x.shape[:-1], self.spec.out_dim), routing.carried
        return y if carried is None else (y, carried.view(*x.shape[:-1], self.carries))

    @property
    def carries(self) -> int:
        """The number of values per token that the router passes on to the next layer."""
        return self.router.carries

    def tokens(
        self, x: Tensor, mask: Column = None, ids: Column = None, labels: Column = None, carried: Column = None
    ) -> Tokens:
        """The forward's arguments, checked and flattened, padding set to 0."""
        return tokens_of(self.name, self.spec, self.carries, x, mask, ids, labels, carried)

    def route(self, tokens: Tokens, without: str | None = None) -> Routing:
        """Decide where tokens go; `without`: leave one plugin's biases out."""
        with without_autocast(tokens.x.device):
            scored = self.router.score(tokens)
            logits, carried = scored if self.carries else (scored, None)
            routing = self.decide(tokens, logits, without)
            routing.carried = carried_by(tokens, self.carries, carried, f"score of the router of '{self.name}'")
            return routing

    def decide(self, tokens: Tokens, logits: Sequence[Tensor], without: str | None = None) -> Routing:
        """The part of `route` after the scores. logits: one [T, n] per level."""
        named = zip(self.router.levels, logits, self.biases, strict=True)
        levels = tuple(
            biased_level(level.name, index, raw_Tn, tokens, [bias for name, bias in biases.items() if name != without])  # type: ignore[operator]
            for index, (level, raw_Tn, biases) in enumerate(named)
        )
        probs_TE, plan = self.router.select(tokens, levels)
        slots = plan if isinstance(plan, Slots) else None
        if isinstance(plan, Slots):
            plan = assign(tokens.x.new_empty(0, 1), tokens.x.new_empty(0, 1, dtype=torch.long), tokens)
        capacity = self.spec.capacity if self.training else self.spec.eval_capacity
        if capacity is not None:
            plan = within_capacity(plan, self.spec, tokens, capacity)
        return Routing(tokens, levels, probs_TE, plan, self.spec.experts, self.spec.top_k, slots)

    # -- sums ------------------------------------------------------------------------------------

    def measure(self, routing: Routing) -> dict[str, Tensor]:
        """The sums of one forward by name, as `Stats` describes them."""
        return {**sums_of(routing), **measured(routing, self.measures, self)}

    def aux_terms(self, routing: Routing) -> dict[str, Tensor]:
        """Every loss term of one forward, unweighted: "plugin", or "plugin.key" for a loss of several terms."""
        terms: dict[str, Tensor] = {}
        for bound in self.losses:
            answer = bound({"routing": routing, "layer": self, "state": self.state_of(bound.plugin)})
            for key, value in answer.items() if isinstance(answer, Mapping) else (("", answer),):
                terms[f"{bound.plugin}.{key}" if key else bound.plugin] = value
        return terms

    def weight_of(self, term: str) -> float:
        """The coefficient of a loss term: its plugin's option `weight`."""
        return self.weights[term.partition(".")[0]]

    def state_of(self, plugin: str) -> Any:
        """The plugin's state in this layer, or None."""
        return self.states[plugin] if plugin in self.states else None  # noqa: SIM401 (no ModuleDict.get)

    def bias_sums(self, routing: Routing) -> dict[str, Tensor]:
        """What the biases measure of one forward, as "LEVEL/PLUGIN/NAME"."""
        return {
            f"{level.name}/{name}/{key}": value.detach()
            for level, biases in zip(routing.levels, self.biases, strict=True)
            for name, bias in biases.items()  # type: ignore[operator]
            for key, value in bias.measure(level, routing.tokens).items()
        }

    def _attach_ledger(self, y_TO: Tensor, routing: Routing) -> Tensor:
        """Pass a training forward's output through the ledger; see there."""
        with without_autocast(y_TO.device):
            seen = routing.over_ranks() if self.losses and distributed() and not self.spec.local_losses else routing
            terms = self.aux_terms(seen)
            sums = self.training_sums(routing, terms, seen.tokens.count)
            aux = None
            for name, value in terms.items():
                term = self.weight_of(name) * value
                aux = term if aux is None else aux + term
        if aux is not None:
            self.sums.aux_value.add_(aux.detach())
        plan = routing.plan
        routed: tuple[Any, ...] = (None, None, None, None)
        if self.sums.signal_sizes:
            weight_N = torch.where(plan.kept, plan.weight.detach(), 0)
            routed = plan.token, plan.expert, weight_N, self.signals
        out: Tensor = Ledger.apply(y_TO, self.sums.step, sums, aux, self.sums.aux_scale, *routed)
        return out

    def training_sums(self, routing: Routing, terms: Mapping[str, Tensor], count: Tensor) -> Tensor:
        """What a training forward with these loss terms of `count` tokens adds to the step's sums, flat."""
        real = count > 0  # a forward without a real token counts as no forward
        sums = {**self.measure(routing), "forwards": real, **self.bias_sums(routing)}
        losses = {f"loss.{name}": one.detach() for name, one in terms.items()}
        return flat({**sums, **losses}, self.sums.step_layout, self.sums.step.dtype)

    def signals(self, grad_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """The signals of all biases that ask for one, concatenated; called in backward."""
        signals, grad_TD = [], of_mean_over_ranks(grad_TD)
        for index, biases in enumerate(self.biases):
            unit_of = self.router.unit_of_expert(self.router.levels[index].name)
            unit_N = expert_N if unit_of is None else unit_of[expert_N]
            for bias in biases.values():  # type: ignore[operator]
                if bias.wants_signal:
                    signals.append(at_least_fp32(bias.signal(grad_TD, token_N, unit_N, weight_N)).view(-1))
        return torch.cat(signals)

    def step_load(self, routing: Routing) -> Tensor:
        """[E]: a forward's load plus the load that backward passes of this step have counted so far, over all ranks.

        A forward that is recomputed in its backward gets the same result again.
        """
        load_E = count_by(routing.plan.expert, routing.plan.selected, routing.experts)
        so_far = self.sums.of_step() if hasattr(self, "sums") else None  # there are none in the first rehearsal
        return all_reduce_sum(load_E if so_far is None else load_E + unflat(so_far, self.sums.step_layout)["load"])

    @property
    def load_since_growth(self) -> Tensor | None:
        """[E]: assignments to each expert since the layer last grew; None before the first step."""
        return self.sums.load_since_growth

    def _rehearse(self, first: bool = False) -> LayerSums:
        """Run four tokens through and set up the sums. first: the layer is not in use yet."""
        like = next((p for p in self.all_parameters() if p.is_floating_point()), torch.empty(0))
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            routing = self.route(self.tokens(**drawn(self.spec, like)))  # type: ignore[arg-type]
            check_plan(self.name, routing.plan)
            counted, terms, of_biases = self.measure(routing), self.aux_terms(routing), self.bias_sums(routing)
        if first:  # a layer in use may be frozen
            check_terms(self.name, terms)
        layouts = layouts_of(counted, of_biases, terms)
        sizes = {
            (index, name): level.size
            for index, (level, biases) in enumerate(zip(self.router.levels, self.bias_levels(), strict=True))
            for name, bias in biases.items()
            if bias.wants_signal
        }
        y_TO, plan = output_of(self.experts, routing, self.spec.out_dim), routing.plan
        found = self.signals(torch.zeros_like(y_TO), plan.token, plan.expert, plan.weight) if sizes else ()
        if len(found) != sum(sizes.values()):
            message = f"layer '{self.name}': a bias's signal is not one number for each unit of its level"
            raise UsageError(message, code="signal-wrong-length")
        held = next(self.all_parameters(), like)
        return LayerSums(*layouts, sizes, torch.empty(0, dtype=like.dtype, device=held.device))

    # -- parts and sizes ---------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part by its path: "router", "experts", "biases.0.NAME", "states.NAME"."""
        for where, module in self.named_modules():
            if isinstance(module, Part):
                yield where, module

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once, those that its parts borrow from other modules included."""
        found = (getattr(part, name) for _, part in self.parts() for name in part.axes)
        yield from dict.fromkeys(one for one in (*found, *self.parameters()) if isinstance(one, nn.Parameter))

    def bias_levels(self) -> list[dict[str, Bias]]:
        """The biases of each level by plugin, in the order typed."""
        return [dict(level.items()) for level in self.biases]  # type: ignore[operator]

    def parts_of_plugins(self) -> dict[str, Part]:
        """The plugins' states in this layer."""
        return dict(self.states.items())  # type: ignore[arg-type]

    def refit(self) -> None:
        """Adopt the present sizes of the parts' tensors, and drop all counts so far."""
        self.sizes = _sizes_of(self)
        self.spec = attrs.evolve(self.spec, experts=self.sizes["expert"])
        last_terms = self.sums.last_terms
        self.sums = self._rehearse()
        self.sums.last_terms = last_terms

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.dim} -> {spec.out_dim}, experts={spec.experts}, top_k={spec.top_k}"


def _sizes_of(layer: MoE, given: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """The size of each population, on which all parts must agree. given: tensors that replace some of theirs."""
    found: dict[str, tuple[int, str]] = {}
    for where, part in layer.parts():
        for name, axis in part.axes.items():
            tensor = (given or {}).get(f"{where}.{name}", getattr(part, name))
            size = tensor.shape[axis.axis] if tensor.dim() > axis.axis else -1
            first, other = found.setdefault(axis.of, (size, f"{where}.{name}"))
            if size != first:
                mismatch = f"{where}.{name} is for {size} units of '{axis.of}', {other} for {first}"
                raise UsageError(f"layer '{layer.name}': {mismatch}", code="sizes-disagree")
    return {"expert": layer.spec.experts, **{of: size for of, (size, _) in found.items()}}


def new_copy_id() -> str:
    """An id that a layer shares with later copies of it, by which growth finds them."""
    return uuid.uuid4().hex


def _before_load(layer: MoE, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise UsageError, before anything changes, for a state that fits this layer at no number of experts."""
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    sizes = _sizes_of(layer, given)
    if sizes == layer.sizes:
        return
    attrs.evolve(layer.spec, experts=sizes["expert"])
    for where, part in layer.parts():
        staged = {name: given[f"{where}.{name}"].clone() for name in part.axes if f"{where}.{name}" in given}
        if staged:
            part.adjust_rows(staged, {})


def _after_load(layer: MoE, _: Any) -> None:
    """The tensors that were loaded may be of another number of experts."""
    if _sizes_of(layer) != layer.sizes:
        old = layer.sums.step
        old.grad = None  # counts of experts that are gone
        layer.refit()
        invalidate(old)
        forget_old_shapes(layer.all_parameters())
