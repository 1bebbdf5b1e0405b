"""Replay: apply other routers, biases and capacities to the logits of a routing trace.

Suffixes: T tokens, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.options import Settings, build
from ..contract.parts import Bias
from ..contract.routing import Routing, Spec
from ..contract.stats import Finding, plain
from ..engine.controllers import apply_controllers
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..layer.moe import MoE
from ..registry.discovery import find, load, pick
from ..registry.manager import Plugins
from ..run.traces import Forward, LayerTrace, Trace
from .counted_layer import CountedLayer

NUMBERS = ("cv", "maxvio", "active", "entropy", "dropped", "agreement", "first")  # of a replayed layer
RECORDED, NONE = "recorded", "none"  # alternatives to a bias plugin


class Refused(Exception):
    """The trace does not hold what this variant needs to decide."""


@attrs.frozen
class ReplayVariant:
    """A combination of router, bias, capacity and top_k to apply to the recorded logits.

    router, bias: plugins. bias may also be "none", or "recorded": the recorded values. capacity: as in `Spec`.
    top_k: None for the recorded number.
    """

    router: str
    bias: str = NONE
    capacity: float | None = None
    top_k: int | None = None


class FrozenBias(Bias):
    """A bias with its recorded values."""

    def __init__(self, value: Tensor, selection_only: bool) -> None:
        super().__init__()
        self.selection_only = selection_only
        self.expert_buffer("value", value)

    value: Tensor

    def forward(self) -> Tensor:
        return self.value


def variants(
    trace: Trace,
    routers: Sequence[str],
    biases: Sequence[str],
    capacities: Sequence[float | None],
    top_ks: Sequence[int | None],
    settings: Settings,
) -> list[ReplayVariant]:
    """All combinations. Raises UsageError for a name or an option that does not exist.

    By default the router is the recorded one, and the biases are the recorded ones for the recorded router and none
    for any other. Without anything to try, a trace whose router is not a plugin has no variants.
    """
    if trace.router not in find() and not (routers or biases or capacities or top_ks or settings):
        return []
    routers = routers or [trace.router]
    _check_names(trace, routers, [bias for bias in biases if bias not in (RECORDED, NONE)], settings)
    usual = {router: RECORDED if trace.biased and router == trace.router else NONE for router in routers}
    return [
        ReplayVariant(router, bias, capacity, top_k)
        for router in routers
        for bias in biases or [usual[router]]
        for capacity in capacities or [None]
        for top_k in top_ks or [None]
    ]


def _check_names(trace: Trace, routers: Sequence[str], biases: Sequence[str], settings: Settings) -> None:
    installed = find()
    if trace.router in routers and trace.router not in installed:
        message = f"the trace was recorded from '{trace.router}', which is not a plugin; name some with --routers"
        raise UsageError(message, code="router-not-installed")
    for kind, names in (("router", routers), ("bias", biases)):
        for name in names:
            found = pick(name, installed)
            if found.kind != kind:
                raise UsageError(f"'{name}' is a {found.kind}, not a {kind}", code="wrong-kind")
            build(load(found), found.title, settings.get(name, {}))
    if unused := settings.keys() - {*routers, *biases}:
        message = f"options are set for {listed(sorted(unused))}, which is not replayed"
        raise UsageError(message, code="unused-options")


def recorded(trace: Trace, by_label: bool = False) -> list[dict[str, Any]]:
    """The rows of the recorded decisions, as the reference of the others. by_label: as for `replay`."""
    names = dict.fromkeys(bias["name"] for layer in trace.layers for bias in layer.biases)
    head = {"recorded": True, "router": trace.router, "bias": ",".join(names) or NONE, "capacity": None}
    rows: list[dict[str, Any]] = []
    for layer in trace.layers:
        counted = _Counts(Plugins(), layer.name, layer.spec, labels_of(layer) if by_label else [])
        for forward in layer.forwards:
            routing = forward.routing(layer.spec)
            counted.add(routing, routing)
        rows += [{**head, "layer": layer.name, **row, "agreement": 1.0, "first": 1.0} for row in counted.rows(trace)]
    return [*rows, *_means(head, rows)]


def replay(
    trace: Trace,
    variant: ReplayVariant,
    settings: Settings | None = None,
    batch: int | None = None,
    by_label: bool = False,
) -> list[dict[str, Any]]:
    """One row per layer and one with their means; or one row whose `refused` says why it can't be replayed.

    The router is in eval mode, without noise; capacity applies as in training. A bias first learns in one pass
    over the trace, one step per forward; the metrics are those of its final values. batch: split forwards into steps
    of at most that many rows (samples, or sequences); capacity applies to each step. Rows hold `NUMBERS`, the load
    and the verdict. agreement: mean over tokens of |S ∩ S'| / max(|S|, |S'|), where S and S' are the experts chosen
    then and now, before capacity drops any. first: the share of tokens with the same first choice. by_label: after
    each row, one for the tokens of each label; `label` is its name, or None in the rows of all tokens.
    """
    rows, head = [], attrs.asdict(variant)
    for layer in trace.layers:
        try:
            labels = labels_of(layer) if by_label else []
            counted = _replayed(layer, variant, settings or {}, batch, labels)
            rows += [{**head, "layer": layer.name, **row} for row in counted.rows(trace)]
        except (Refused, UsageError) as error:
            return [{**head, "layer": layer.name, "refused": str(error)}]
    return [*rows, *_means(head, rows)]


def labels_of(layer: LayerTrace) -> list[int]:
    """The labels of a layer's tokens, smallest first; those below 0 mean none."""
    found = [forward.labels.unique() for forward in layer.forwards if forward.labels is not None]
    return sorted({int(label) for labels in found for label in labels if label >= 0})


def label_names(trace: Trace) -> dict[int, str]:
    """The names of a trace's labels, where it has them."""
    names = trace.about.get("labels")
    return dict(enumerate(map(str, names))) if isinstance(names, list) else {}


class _Counts:
    """The decisions of a layer that are compared with the recorded ones: of all tokens, and of each label's."""

    def __init__(self, plugins: Plugins, name: str, spec: Spec, labels: Sequence[int]) -> None:
        self.top_k = spec.top_k
        self._layers = {label: CountedLayer(plugins, name, spec) for label in (None, *labels)}
        self._sums = {label: torch.zeros(3, dtype=torch.float64) for label in self._layers}
        self._known = False

    def add(self, now: Routing, then: Routing) -> None:
        """Count one forward, as it is decided now and was recorded then."""
        self._known |= bool(then.plan.selected.any())
        for label, counted in self._layers.items():
            part = now if label is None else only(now, label)
            counted.count(part)
            self._sums[label] += _agreement(part, then if label is None else only(then, label))

    def rows(self, trace: Trace) -> Iterator[dict[str, Any]]:
        """A row for all tokens, and one for each label."""
        names = label_names(trace)
        for label, counted in self._layers.items():
            tokens = float(self._sums[label][2])
            total = self._sums[label].tolist()
            agreement, first = (total[0] / tokens, total[1] / tokens) if tokens and self._known else (None, None)
            name = None if label is None else names.get(label, str(label))
            yield {"label": name, "top_k": self.top_k, **_numbers(counted), "agreement": agreement, "first": first}


def only(routing: Routing, label: int) -> Routing:
    """The decision on the tokens of one label alone; the others are as padding."""
    labels_T, tokens, plan = routing.tokens.labels, routing.tokens, routing.plan
    assert labels_T is not None
    mask_T = (labels_T == label) if tokens.mask is None else (labels_T == label) & tokens.mask
    inside_N = mask_T[plan.token]
    return attrs.evolve(
        routing,
        tokens=attrs.evolve(tokens, mask=mask_T, lots=tokens.lots),
        plan=attrs.evolve(plan, selected=plan.selected & inside_N, kept=plan.kept & inside_N),
    )


def _sums(layer: MoE, routing: Routing) -> Tensor:
    """What a training forward with this routing adds to the step's sums."""
    return layer.training_sums(routing, layer.aux_terms(routing), routing.tokens.count)


@torch.no_grad()
def _replayed(
    recorded: LayerTrace, variant: ReplayVariant, settings: Settings, batch: int | None, labels: Sequence[int]
) -> _Counts:
    engine, layer = _built(recorded, variant, settings)
    steps = list(_steps(recorded.forwards, batch))
    try:
        if any(layer.bias_levels()) or layer.parts_of_plugins():
            for forward in steps:
                routing = _decide(layer, forward)
                apply_controllers(layer, _sums(layer, routing), with_load=False)
        counted = _Counts(engine.plugins, layer.name, layer.spec, labels)
        for forward in steps:
            counted.add(_decide(layer, forward), forward.routing(recorded.spec))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # it used what is not recorded
        why = f"it can't decide on recorded logits alone ({type(error).__name__}: {error})"
        raise Refused(f"router '{variant.router}': {why}") from error
    return counted


def _built(recorded: LayerTrace, variant: ReplayVariant, settings: Settings) -> tuple[Engine, MoE]:
    """A layer with this router and bias, and experts of minimal size. Raises Refused or UsageError."""
    plugins = [variant.router, *([variant.bias] if variant.bias not in (RECORDED, NONE) else [])]
    used: Settings = {name: dict(settings[name]) for name in plugins if name in settings}
    if variant.router == recorded.router:
        used[variant.router] = {**recorded.options, **used.get(variant.router, {})}
    spec = {name: getattr(recorded.spec, name) for name in ("experts", "capacity_per", "vocab", "classes", "causal")}
    engine = Engine(plugins, used)
    layer = engine.moe(
        recorded.spec.dim,
        1,
        top_k=recorded.spec.top_k if variant.top_k is None else variant.top_k,
        capacity=variant.capacity,
        name=recorded.name,
        **spec,
    )
    _check_levels(layer, recorded, variant.router)
    _give_state(layer, recorded, variant.router)
    for where, part in layer.parts():
        if part.wants_expert_grad or (isinstance(part, Bias) and part.wants_signal):
            raise Refused(f"'{where.rpartition('.')[2]}' acts on gradients, which a trace does not hold")
    if variant.bias == RECORDED:
        _freeze(layer, recorded)
    layer.train()
    layer.router.eval()
    return engine, layer


def _check_levels(layer: MoE, recorded: LayerTrace, router: str) -> None:
    """Raise Refused if the router has other levels than the trace."""
    levels = [(level.name, level.size) for level in layer.router.levels]
    if levels and levels != recorded.levels:
        needed, held = (
            " and ".join(f"{size} of '{name}'" for name, size in sizes) for sizes in (levels, recorded.levels)
        )
        raise Refused(f"router '{router}' needs logits for {needed}, but the trace holds them for {held or 'none'}")


def _give_state(layer: MoE, recorded: LayerTrace, router: str) -> None:
    """Restore the recorded router's state. Other routers must have no learned weights beyond those for the logits."""
    known = recorded.state if router == recorded.router else {}
    learned = {name for name, _ in layer.router.named_parameters()}
    rows = {name for name, axis in layer.router.axes.items() if axis.role == "logit_row"}
    for name, tensor in layer.router.state_dict().items():
        if name in known and known[name].shape == tensor.shape:
            tensor.copy_(known[name])
        elif name in learned - rows:
            raise Refused(f"router '{router}' has further learned weights ('{name}'), which the trace does not hold")


def _freeze(layer: MoE, recorded: LayerTrace) -> None:
    """Add the recorded biases to the layer."""
    names = [level.name for level in layer.router.levels]
    for bias in recorded.biases:
        if bias["level"] not in names:
            raise Refused(
                f"the recorded bias '{bias['name']}' is of level '{bias['level']}', which this router does not have"
            )
        of_level: Any = layer.biases[names.index(bias["level"])]
        of_level[bias["name"]] = FrozenBias(bias["value"], bias["selection_only"])


def _steps(forwards: Sequence[Forward], batch: int | None) -> Iterator[Forward]:
    """The forwards, split into at most `batch` rows each."""
    for forward in forwards:
        rows = forward.shape[0]
        for start in range(0, rows, batch or rows):
            yield forward if batch is None else forward.rows(start, start + batch)


def _decide(layer: MoE, forward: Forward) -> Routing:
    routing = layer.decide(forward.tokens, [forward.logits[level.name] for level in layer.router.levels])
    if routing.slots is not None:
        raise Refused(f"the router of layer '{layer.name}' mixes tokens into slots, so there are no choices to compare")
    return routing


def _agreement(now: Routing, then: Routing) -> Tensor:
    """[3]: sums over real tokens of the agreement, of equal first choices, and of 1."""
    now_TE, then_TE = now.chosen(), then.chosen()
    most_T = torch.maximum(now_TE.sum(-1), then_TE.sum(-1))
    shared_T = torch.where(most_T > 0, torch.minimum(now_TE, then_TE).sum(-1) / most_T.clamp(min=1), 1)
    sums = [now.tokens.real(values).double().sum() for values in (shared_T, _first(now) == _first(then))]
    return torch.stack([*sums, now.tokens.count.double()])


def _first(routing: Routing) -> Tensor:
    """[T]: each token's first choice; -1 without one."""
    plan = routing.plan
    best_N = plan.selected & (plan.rank == 0)
    none_T = torch.full((routing.tokens.x.shape[0],), -1, dtype=torch.long)
    return none_T.index_put((plan.token[best_N],), plan.expert[best_N])


def _numbers(counted: CountedLayer) -> dict[str, Any]:
    """The first five of `NUMBERS`, the load and the verdict."""
    metrics = counted.metrics()
    verdict = metrics.get("verdict")
    numbers = {name: plain(metrics.get(name)) for name in (*NUMBERS[:5], "load")}
    return {**numbers, "verdict": verdict.name if isinstance(verdict, Finding) else None}


def _means(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row of means over the layers, for all tokens and for each label."""
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        means: dict[str, float | None] = {}
        for name in NUMBERS:
            values = [row[name] for row in of_label if row.get(name) is not None]
            means[name] = sum(values) / len(values) if values else None
        top_ks = {row["top_k"] for row in of_label}
        yield {**head, "top_k": top_ks.pop() if len(top_ks) == 1 else None, "layer": "mean", "label": label, **means}
