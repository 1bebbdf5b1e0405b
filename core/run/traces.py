"""Routing traces: the logits and choices of a model's layers, in one checksummed file.

Suffixes: T tokens, n units of a level, N assignments.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.options import values_of
from ..contract.routing import Assignments, Level, Routing, Spec, Tokens
from ..engine.engine import Engine
from ..errors import UsageError
from ..layer.moe import MoE
from ..layer.probing import uncounted
from ..layer.sums import sums_of
from .trees import read_tree, write_tree

FILE = "routing.safetensors"  # in a run's folder
LIMIT = 20_000  # tokens of a layer, padding included


@attrs.define(eq=False)
class Forward:
    """One layer's decision in one forward, on the CPU.

    shape: the leading shape of its T tokens. logits: [T, n] by level, raw and in the precision that the router saw.
    lots: [T]. mask, ids, labels: [T] or None; see `Tokens`. token, expert, gate, rank, selected: [N], as in
    `Assignments`.
    """

    shape: tuple[int, ...]
    logits: dict[str, Tensor]
    lots: Tensor
    mask: Tensor | None
    ids: Tensor | None
    labels: Tensor | None
    token: Tensor
    expert: Tensor
    gate: Tensor
    rank: Tensor
    selected: Tensor

    @classmethod
    def of(cls, routing: Routing) -> "Forward":
        """A copy of a routing on the CPU."""
        tokens, plan = routing.tokens, routing.plan
        logits = {level.name: level.logits for level in routing.levels}
        choice = (plan.token, plan.expert, plan.weight, plan.rank, plan.selected)
        forward = cls(tokens.shape, logits, tokens.lots, tokens.mask, tokens.ids, tokens.labels, *choice)
        return cls(**{name: _on_cpu(value) for name, value in attrs.asdict(forward, recurse=False).items()})

    def rows(self, start: int, stop: int) -> "Forward":
        """The decision on rows `start` to before `stop` of the leading shape: samples, or sequences."""
        each = math.prod(self.shape[1:])
        first, last = start * each, min(stop, self.shape[0]) * each
        inside_N = (self.token >= first) & (self.token < last)
        columns = {name: getattr(self, name) for name in ("lots", "mask", "ids", "labels")}
        by_token: dict[str, Any] = {name: None if col is None else col[first:last] for name, col in columns.items()}
        by_choice: dict[str, Any] = {
            name: getattr(self, name)[inside_N] for name in ("expert", "gate", "rank", "selected")
        }
        return Forward(
            shape=(min(stop, self.shape[0]) - start, *self.shape[1:]),
            logits={name: value[first:last] for name, value in self.logits.items()},
            token=self.token[inside_N] - first,
            **by_token,
            **by_choice,
        )

    @property
    def tokens(self) -> Tokens:
        """The tokens without their hidden states: x is [T, 0], which makes a router that reads it fail."""
        count = math.prod(self.shape)
        return Tokens(torch.empty(count, 0), tuple(self.shape), self.mask, self.ids, self.labels, self.lots)

    def routing(self, spec: Spec) -> Routing:
        """The recorded decision."""
        tokens = self.tokens
        levels = tuple(Level(name, value, value, tokens, at) for at, (name, value) in enumerate(self.logits.items()))
        plan = Assignments(self.token, self.expert, self.gate, self.rank, self.selected, self.selected)
        return Routing(tokens, levels, None, plan, spec.experts, spec.top_k)


@attrs.define(eq=False)
class LayerTrace:
    """The decisions of one layer.

    router: its plugin; for a foreign block the plugin that decides alike, or the block's class if there is none.
    options: the plugin's. state: the router's tensors. biases: level, name, selection_only and value [n] of each, at
    the time of recording. held: the number of tokens in `forwards`.
    """

    name: str
    router: str
    options: dict[str, Any]
    spec: Spec
    state: dict[str, Tensor]
    biases: list[dict[str, Any]]
    forwards: list[Forward] = attrs.field(factory=list)
    held: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.held = sum(math.prod(forward.shape) for forward in self.forwards)

    @property
    def levels(self) -> list[tuple[str, int]]:
        """Name and size of each level."""
        return [(name, value.shape[-1]) for name, value in self.forwards[0].logits.items()]


@attrs.define(eq=False)
class Trace:
    """The decisions of a model's layers, up to `limit` tokens per layer.

    about: where it was recorded. cut: there were more tokens.
    """

    layers: list[LayerTrace] = attrs.field(factory=list)
    about: dict[str, Any] = attrs.field(factory=dict)
    limit: int = LIMIT
    cut: bool = False

    @property
    def router(self) -> str:
        """The first layer's router."""
        return self.layers[0].router

    @property
    def biased(self) -> bool:
        """Whether any layer had biases."""
        return any(layer.biases for layer in self.layers)

    @property
    def tokens(self) -> int:
        """The number of tokens of the layer with the most."""
        return max(sum(math.prod(forward.shape) for forward in layer.forwards) for layer in self.layers)

    def add(self, layer: LayerTrace, routing: Routing) -> bool:
        """Keep one forward's decision, or its first rows; returns True if all of it fits."""
        rows, each = routing.tokens.shape[0], math.prod(routing.tokens.shape[1:])
        fitting = min(rows, (self.limit - layer.held) // max(each, 1))
        self.cut |= fitting < rows
        if fitting and each:
            forward = Forward.of(routing)
            layer.forwards.append(forward if fitting == rows else forward.rows(0, fitting))
            layer.held += fitting * each
        return fitting == rows

    def write(self, path: Path) -> None:
        """Write the trace as one file, atomically. Raises UsageError if it is empty or the file can't be written."""
        layers = [layer for layer in self.layers if layer.forwards]
        if not layers:
            message = f"no token has come through any layer, so there is nothing to write into {path}"
            if self.cut:
                message = f"a single sequence has more tokens than the limit of {self.limit}; raise it to record {path}"
            raise UsageError(message, code="empty-trace")
        note = f"at most the first {self.limit} tokens of each layer, padding included; logits are not rounded"
        tree = attrs.asdict(attrs.evolve(self, layers=layers), filter=lambda field, _: field.init)
        try:
            write_tree(path, {"routing_trace": 1, "note": note, **tree})
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}", code="unwritable-path") from error


def read_trace(path: Path) -> Trace:
    """The trace in a file, or in a run's folder. Raises UsageError if it is missing, damaged or not a trace."""
    path = path / FILE if path.is_dir() else path
    tree = read_tree(path, "routing trace")
    if not isinstance(tree, dict) or tree.get("routing_trace") != 1:
        message = f"{path} holds no routing trace; `moe-engine run --record-routing` writes one"
        raise UsageError(message, code="foreign-file")
    try:
        layers = [
            LayerTrace(
                **{**layer, "spec": Spec(**layer["spec"]), "forwards": [Forward(**item) for item in layer["forwards"]]}
            )
            for layer in tree["layers"]
        ]
        trace = Trace(layers, tree["about"], tree["limit"], tree["cut"])
        if not layers or not all(layer.forwards for layer in layers):
            raise ValueError("it is empty")
        for layer in layers:
            for forward in layer.forwards:
                _check(layer, forward)
        return trace
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        message = f"{path} is damaged: its routing trace is invalid ({type(error).__name__}: {error})"
        raise UsageError(message, code="damaged-file") from error


def _check(layer: LayerTrace, forward: Forward) -> None:
    """Use every part of a decision as later code will, so that an invalid one raises here.

    A file with a valid checksum may still hold the wrong content.
    """
    count, routing = math.prod(forward.shape), forward.routing(layer.spec)
    for column in (forward.lots, forward.mask, forward.ids, forward.labels, *forward.logits.values()):
        if column is not None and column.shape[0] != count:
            raise ValueError(f"a column of {column.shape[0]} for {count} tokens")
    routing.chosen()
    routing.gates()
    sums_of(routing)
    forward.rows(0, forward.shape[0])
    {bias["level"]: (bias["name"], bias["selection_only"], bias["value"].shape) for bias in layer.biases}
    if not isinstance(layer.router, str):
        raise TypeError(f"its router is {layer.router!r}")
    dict(layer.options)
    [tensor.shape for tensor in dict(layer.state).values()]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def record(engine: Engine, forwards: Iterable[Callable[[], object]], about: dict[str, Any]) -> Trace:
    """Record the decisions of the engine's layers in some forwards of the model; metrics do not count them.

    Recording stops when no layer has room for more. Call it in eval mode, without capacity limits and noise.
    """
    trace = Trace([begin(engine, layer) for layer in engine.layers], about)
    for forward in forwards:
        with torch.no_grad(), uncounted(engine.layers):
            forward()
            decided = [layer.watched or [] for layer in engine.layers]
        fitted = [
            trace.add(layer, routing)
            for layer, routings in zip(trace.layers, decided, strict=True)
            for routing in routings
        ]
        if fitted and not any(fitted):
            break
    return trace


def begin(engine: Engine, layer: MoE) -> LayerTrace:
    """An empty trace of a layer: its router, options, spec, state and biases, without decisions."""
    plugins = engine.plugins.override(layer.settings)
    (router,) = (bound.plugin for bound in engine.plugins.bind("moe_router", plugins))
    biases = [
        {"level": level.name, "name": name, "selection_only": bias.selection_only, "value": _on_cpu(bias())}
        for level, biases_of_level in zip(layer.router.levels, layer.bias_levels(), strict=True)
        for name, bias in biases_of_level.items()
    ]
    state = _on_cpu(layer.router.state_dict())
    return LayerTrace(layer.name, router, values_of(plugins[router]), layer.spec, state, biases)
