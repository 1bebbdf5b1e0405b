"""Metrics for the MoE blocks of transformers models, without changing them or importing transformers.

Suffixes: B sequences, S tokens of each, T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..analysis.counted_layer import NO_DATA, CountedLayer
from ..contract.families import Block, Routed
from ..contract.routing import Level, Routing, Spec, Tokens, assign
from ..contract.stats import Metrics
from ..engine.engine import Engine
from ..errors import UsageError
from ..layer.moe import MoE
from ..run.traces import LIMIT, LayerTrace, Trace
from .calls import Calls, Hook, follow
from .families import blocks_of
from .tapping import Tap


@attrs.define(eq=False)
class Watched:
    """What is known of a block.

    counted: its metrics, and trace: its record, None until its first forward, which tells its sizes. full: the trace
    is. routed: what its router returned in the forward that is running. probabilities: whether that is a softmax
    already; None before the first forward.
    """

    block: Block
    counted: CountedLayer | None = None
    trace: LayerTrace | None = None
    full: bool = False
    routed: Routed | None = None
    probabilities: bool | None = None

    def take_logits(self, x_TD: Tensor) -> Tensor:
        """The logits [T, E] of the forward that is running: those that its router returned."""
        routed, self.routed = self.routed, None
        if routed is None:
            return multiplied(self.block.router, x_TD)
        logits_TE = self.block.family.logits_from(routed.returned).detach()
        logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1]).float()
        if self.probabilities is None and len(logits_TE):
            self.probabilities = are_probabilities(logits_TE)
        # up to a constant of each token these are the logits
        return logits_TE.clamp(min=torch.finfo(torch.float32).tiny).log() if self.probabilities else logits_TE


class Watcher:
    """Counts the choices of each MoE block of a model until `close()`; returned by `watch`.

    trace: the recorded decisions; without layers unless they are recorded. Copies and pickles of the model are not
    watched. Raises UsageError for a model without a known block.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        record: bool = False,
        limit: int = LIMIT,
        family: str | None = None,
        labels: Tensor | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"watch() takes a model, not {model!r}", code="not-a-model")
        if any(isinstance(module, MoE) for module in model.modules()):
            message = "watch() reads foreign blocks, but this model has layers of an engine; call engine.metrics()"
            raise UsageError(message, code="layers-of-an-engine")
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            message = f"limit is the number of tokens of each layer that a trace keeps, at least 1, not {limit!r}"
            raise UsageError(message, code="bad-limit")
        blocks = blocks_of(model, family)
        self._plugins, self._record = engine.plugins, record
        self._classes = engine.defaults.get("classes")
        self._watched = {block.name: Watched(block) for block in blocks}
        kinds = list(dict.fromkeys(type(block.module).__name__ for block in blocks))
        self.trace = Trace([], {"model": type(model).__name__, "blocks": kinds}, limit)
        self._calls = Calls()
        self._labels = None if labels is None else self._checked(labels)
        self._handles = follow(self._calls, model, [block.module for block in blocks])
        self._taps = [self._tap(watched) for watched in self._watched.values()]

    def _tap(self, watched: Watched) -> Tap:
        if watched.block.family.decides == "router":
            return Tap(watched.block, partial(self._count_routed, watched), None, Hook)
        return Tap(watched.block, partial(setattr, watched, "routed"), partial(self._count, watched), Hook)

    # -- for the user ----------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metrics]:
        """All metrics of each block since the last call, by the block's name in the model.

        Forwards count both in training and in eval mode. A block that saw no real token has the verdict "no data".
        With several processes, each counts its own tokens.
        """
        return {
            name: {"verdict": NO_DATA} if watched.counted is None else watched.counted.metrics()
            for name, watched in self._watched.items()
        }

    @contextmanager
    def labelled(self, labels: Tensor | int) -> Iterator[None]:
        """Inside, the model's forwards are of sequences with these labels [B], of tokens with these [B, S], or of one.

        Labels are whole numbers from 0, of classes or domains, for metrics of specialization and for the trace; the
        engine must know how many there are: Engine(..., classes=N). Raises UsageError.
        """
        before, self._labels = self._labels, self._checked(labels)
        try:
            yield
        finally:
            self._labels = before

    def _checked(self, labels: Any) -> Tensor:
        if not self._classes:
            message = "labels need the number of classes; build the engine with Engine(..., classes=N)"
            raise UsageError(message, code="no-classes")
        if isinstance(labels, int) and not isinstance(labels, bool) and 0 <= labels < self._classes:
            return torch.tensor(labels)
        if not isinstance(labels, Tensor) or labels.dim() not in (1, 2) or labels.is_floating_point():
            message = (
                "labels must be a tensor of whole numbers, [batch] or [batch, tokens], or one number below "
                f"classes={self._classes}, not {_told(labels)}"
            )
            raise UsageError(message, code="bad-labels")
        return labels

    def write_routing(self, path: str | Path) -> None:
        """Write the recorded trace for `moe-engine replay`. Raises UsageError if nothing was recorded."""
        if not self.trace.layers:
            raise UsageError("nothing was recorded; call watch(engine, model, record=True)", code="nothing-recorded")
        self.trace.write(Path(path))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.close()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the forwards ----------------------------------------------------------------------------

    def _count_routed(self, watched: Watched, routed: Routed) -> None:
        """After the forward of a router that tells the decision."""
        watched.routed = routed
        self._count(watched, [])

    @torch.no_grad()
    def _count(self, watched: Watched, given: list[Any]) -> None:
        """Count a block's decision."""
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running, so this is activation checkpointing repeating the forward
        x_TD, expert_TK, gate_TK = decision_of(watched.block, given, watched.routed)
        logits_TE = watched.take_logits(x_TD)
        if watched.counted is None:
            check_logits(watched.block, logits_TE, expert_TK)
        routing = routing_of(watched.block, logits_TE, expert_TK, gate_TK, self._tokens(x_TD))
        if watched.counted is None:
            self._first(watched, routing)
        self._take(watched, routing)

    def _take(self, watched: Watched, routing: Routing) -> None:
        """Count a decision, and record it."""
        assert watched.counted is not None
        watched.counted.count(routing)
        if watched.trace is not None and not watched.full:
            watched.full = not self.trace.add(watched.trace, routing)
            if watched.full:
                self._calls.warn(
                    f"the trace has reached its limit of {self.trace.limit} tokens of each layer; later ones are "
                    "counted, but not recorded: watch(..., record=True, limit=N) keeps N of them"
                )

    def _first(self, watched: Watched, routing: Routing) -> None:
        """Set up what a block's first forward tells the sizes of."""
        spec = spec_of(watched.block, routing, self._classes)
        watched.counted = CountedLayer(self._plugins, watched.block.name, spec)
        if self._record:
            watched.trace = _trace(watched.block, spec)
            self.trace.layers.append(watched.trace)

    def _tokens(self, x_TD: Tensor) -> Tokens:
        """The tokens of the block that is running."""
        count, shape = x_TD.shape[0], self._calls.shape
        mask, ids, labels = self._calls.mask(shape), self._calls.ids(count), None
        if self._labels is not None:
            labels = labels_of(self._labels, shape).to(x_TD.device)
        tokens = Tokens(x_TD.detach(), shape, None if mask is None else mask.to(x_TD.device), labels=labels)
        tokens.x = tokens.real(tokens.x)
        tokens.ids = None if ids is None else tokens.real(ids.to(x_TD.device))
        return tokens


def watch(
    engine: Engine,
    model: nn.Module,
    record: bool = False,
    limit: int = LIMIT,
    family: str | None = None,
    labels: Tensor | int | None = None,
) -> Watcher:
    """Compute the engine's metrics and verdict for the MoE blocks of a transformers model, without changing it.

        with watch(engine, model) as watcher:
            model(input_ids, attention_mask=mask)
            print(watcher.metrics())

    model: any architecture of transformers with experts, or a module that contains one, adapters (PEFT) included; the
    family plugin named after its `model_type` reads it, or else the generic one. The innermost module that is called
    with an `attention_mask` tells which tokens are padding; without a mask all tokens count, with a warning if only
    inner layers are watched or called. A forward repeated by activation checkpointing counts once, and copies of the
    model do not count. record: also keep a routing trace of the first `limit` tokens of each layer, padding included,
    for `watcher.write_routing(path)`. family: another family plugin. labels: the classes of the tokens in every
    forward, by sequence [B], by token [B, S], or one number for all, except inside `watcher.labelled(labels)`, which
    gives the next batch its own. Raises UsageError for a model without a block that a family knows.
    """
    return Watcher(engine, model, record, limit, family, labels)


def decision_of(block: Block, given: list[Any], routed: Routed | None) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states [T, D], the choices [T, K] and their gates [T, K] of a block's forward. Raises UsageError."""
    decision = block.family.decision(block, given, routed)
    if decision is None:
        raise UsageError(
            f"the experts of {block.name} ({type(block.module).__name__}) are not given hidden states, chosen experts "
            f"and their weights, as family '{block.family.name}' expects; close the watcher to run this model",
            code="unknown-decision",
        )
    x_TD, expert_TK, gate_TK = (tensor.detach() for tensor in decision)
    return x_TD, expert_TK.long(), gate_TK


def check_logits(block: Block, logits_TE: Tensor, expert_TK: Tensor) -> None:
    """Raise UsageError for logits that can't be those of the experts that were chosen."""
    tokens, experts = logits_TE.shape
    if tokens != len(expert_TK) or (tokens and int(expert_TK.max()) >= experts):
        message = (
            f"{block.name} chose an expert without a logit: its router's logits are {[tokens, experts]}, its choices "
            f"{list(expert_TK.shape)} up to {int(expert_TK.max())}; check `logits` of family '{block.family.name}'"
        )
        raise UsageError(message, code="unknown-decision")


def routing_of(block: Block, logits_TE: Tensor, expert_TK: Tensor, gate_TK: Tensor, tokens: Tokens) -> Routing:
    """A block's decision, by its router's logits and the choices and gates that its experts were given."""
    scores_TE = block.family.score(logits_TE)
    by_TE = scores_TE if block.bias is None else scores_TE + block.bias
    order_TK = by_TE.gather(1, expert_TK).argsort(dim=-1, descending=True, stable=True)  # not every block sorts
    plan = assign(gate_TK.gather(1, order_TK), expert_TK.gather(1, order_TK), tokens)
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-30)
    level = Level("expert", logits_TE, logits_TE, tokens, bias=block.bias)
    return Routing(tokens, (level,), probs_TE, plan, logits_TE.shape[1], expert_TK.shape[1])


def spec_of(block: Block, routing: Routing, classes: int | None) -> Spec:
    """A block's sizes, by one of its decisions. classes: the number of labels."""
    hidden = block.setting("intermediate_dim", "intermediate_size", default=0)
    return Spec(
        routing.tokens.x.shape[1],
        hidden,
        experts=routing.experts,
        top_k=routing.top_k,
        activation="swiglu",
        causal=True,
        classes=classes,
    )


def labels_of(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[T]: the label of each token of a forward of [B, S]. labels: [], [B] or [B, S]. Raises UsageError."""
    if tuple(labels.shape) not in (shape, shape[:1], ()):
        message = (
            f"labels of {list(labels.shape)} do not fit a forward of {list(shape)} tokens; "
            "give one of each sequence, or one of each token"
        )
        raise UsageError(message, code="labels-do-not-fit")
    rest = (1,) * (len(shape) - labels.dim())
    return labels.reshape(*labels.shape, *rest).expand(shape).reshape(-1)


def _told(value: Any) -> str:
    return f"a tensor of {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _trace(block: Block, spec: Spec) -> LayerTrace:
    """An empty trace of a block. Its router is the strategy that decides alike, or else the block's class."""
    bias_E = block.bias
    router, options = block.family.recipe(block) or (type(block.module).__name__, {})
    if spec.top_k == 1:  # a gate that is the constant 1 changes no choice, and routers refuse it
        options = {name: value for name, value in options.items() if name != "renorm"}
    value = {"level": "expert", "name": "e_score_correction_bias", "selection_only": True}
    biases = [] if bias_E is None else [{**value, "value": bias_E.detach().cpu().float().clone()}]
    return LayerTrace(block.name, router, dict(options), spec, {}, biases)


def are_probabilities(logits_TE: Tensor) -> bool:
    """Whether every row is a distribution: before transformers 5.10 some routers returned softmax(logits) as logits."""
    near_T = (logits_TE.sum(-1) - 1).abs() < 1e-5
    return bool(((logits_TE >= 0).all(-1) & near_T).all())


def multiplied(router: Any, x_TD: Tensor) -> Tensor:
    """The logits [T, E] of a block that multiplies by its router's weight itself (DeepSeek-V2 before 5.16)."""
    return nn.functional.linear(x_TD.detach().float(), router.weight.detach().float())
