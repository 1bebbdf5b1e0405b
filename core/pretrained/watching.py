"""Metrics for the MoE blocks of transformers models, without changing them or importing transformers.

Suffixes: B sequences, S tokens of each, T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..analysis.counted_layer import CountedLayer
from ..contract.routing import Level, Routing, Spec, Tokens, assign
from ..contract.stats import Metrics
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..run.traces import LIMIT, LayerTrace, Trace
from .calls import Calls, Hook
from .families import FAMILIES, Block, are_probabilities, blocks_of, decision_in, logits_from, multiplied


@attrs.define(eq=False)
class Watched:
    """What is known of a block.

    counted: its metrics. trace: None unless it is recorded. full: the trace is. returned [T, E]: the logits that the
    router returned in the forward that is running. probabilities: whether that is a softmax already; None before the
    first forward. hooked: the hooks of its router and experts, by the name of either.
    """

    block: Block
    counted: CountedLayer
    trace: LayerTrace | None
    full: bool = False
    returned: Tensor | None = None
    probabilities: bool | None = None
    hooked: dict[str, tuple[nn.Module, RemovableHandle]] = attrs.field(factory=dict)

    def take_logits(self, x_TD: Tensor) -> Tensor:
        """The logits [T, E] of the forward that is running: those that its router returned."""
        logits_TE, self.returned = self.returned, None
        if logits_TE is None:
            return multiplied(self.block.router, x_TD)
        if self.probabilities is None and len(logits_TE):
            self.probabilities = are_probabilities(logits_TE)
        # up to a constant of each token these are the logits
        return logits_TE.clamp(min=torch.finfo(torch.float32).tiny).log() if self.probabilities else logits_TE


class Watcher:
    """Counts the choices of each MoE block of a model until `close()`; returned by `watch`.

    trace: the recorded decisions; without layers unless they are recorded. Copies and pickles of the model are not
    watched. Raises UsageError for a model without a known block.
    """

    def __init__(self, engine: Engine, model: nn.Module, record: bool = False, limit: int = LIMIT) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"watch() takes a model, not {model!r}", code="not-a-model")
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            message = f"limit is the number of tokens of each layer that a trace keeps, at least 1, not {limit!r}"
            raise UsageError(message, code="bad-limit")
        blocks = blocks_of(model)
        if not blocks:
            known = listed(family.name for family in FAMILIES)
            raise UsageError(
                f"{type(model).__name__} has no block that can be watched; known are those of {known} in "
                "transformers; for layers of engine.moe() call engine.metrics()",
                code="no-known-block",
            )
        self._classes = engine.defaults.get("classes")
        self._watched = {block.name: self._new(engine, block, record) for block in blocks}
        traces = [watched.trace for watched in self._watched.values() if watched.trace is not None]
        kinds = list(dict.fromkeys(type(block.module).__name__ for block in blocks))
        self.trace = Trace(traces, {"model": type(model).__name__, "blocks": kinds}, limit)
        self._calls = Calls()
        self._labels: Tensor | None = None
        self._handles = _follow(self._calls, model, [block.module for block in blocks])
        for watched in self._watched.values():
            enter = Hook(partial(self._hook, watched))
            self._handles.append(watched.block.module.register_forward_pre_hook(enter))
            self._hook(watched)

    def _new(self, engine: Engine, block: Block, record: bool) -> Watched:
        spec = block.spec(self._classes)
        counted = CountedLayer(engine.plugins, block.name, spec)
        return Watched(block, counted, _trace(block, spec) if record else None)

    # -- for the user ----------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metrics]:
        """All metrics of each block since the last call, by the block's name in the model.

        Forwards count both in training and in eval mode. A block that saw no real token has the verdict "no data".
        With several processes, each counts its own tokens.
        """
        return {name: watched.counted.metrics() for name, watched in self._watched.items()}

    @contextmanager
    def labelled(self, labels: Tensor) -> Iterator[None]:
        """Inside, the model's forwards are of sequences with these labels [B], or of tokens with these [B, S].

        Labels are whole numbers from 0, of classes or domains, for metrics of specialization and for the trace; the
        engine must know how many there are: Engine(..., classes=N). Raises UsageError.
        """
        if not self._classes:
            message = "labels need the number of classes; build the engine with Engine(..., classes=N)"
            raise UsageError(message, code="no-classes")
        if not isinstance(labels, Tensor) or labels.dim() not in (1, 2) or labels.is_floating_point():
            message = f"labels must be a tensor of whole numbers, [batch] or [batch, tokens], not {_told(labels)}"
            raise UsageError(message, code="bad-labels")
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def write_routing(self, path: str | Path) -> None:
        """Write the recorded trace for `moe-engine replay`. Raises UsageError if nothing was recorded."""
        if not self.trace.layers:
            raise UsageError("nothing was recorded; call watch(engine, model, record=True)", code="nothing-recorded")
        self.trace.write(Path(path))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        for watched in self._watched.values():
            for _, handle in watched.hooked.values():
                handle.remove()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the hooks -------------------------------------------------------------------------------

    def _hook(self, watched: Watched, *_: Any) -> None:
        """Before a block's forward: hook its router and experts, unless they are the same as before.

        An adapter may have been put around them since.
        """
        block = watched.block
        self._hook_part(watched, block.family.router, "register_forward_hook", self._routed)
        self._hook_part(watched, block.family.experts, "register_forward_pre_hook", self._count, with_kwargs=True)

    def _hook_part(self, watched: Watched, name: str, register: str, act: Callable[..., None], **options: bool) -> None:
        part = getattr(watched.block.module, name)
        hooked, handle = watched.hooked.get(name, (None, None))
        if hooked is not part:
            if handle is not None:
                handle.remove()
            watched.hooked[name] = part, getattr(part, register)(Hook(partial(act, watched)), **options)

    def _routed(self, watched: Watched, _: nn.Module, __: Any, returned: Any) -> None:
        """After the forward of a block's router: keep what it returned."""
        watched.returned = logits_from(returned, watched.counted.spec.experts)

    @torch.no_grad()
    def _count(self, watched: Watched, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the forward of a block's experts: count its decision."""
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running, so this is activation checkpointing repeating the forward
        x_TD, expert_TK, gate_TK = decision_in(watched.block, (*args, *kwargs.values()))
        tokens = self._tokens(x_TD)
        routing = routing_of(watched.block, watched.take_logits(x_TD), expert_TK, gate_TK, tokens)
        watched.counted.count(routing)
        if watched.trace is not None and not watched.full:
            watched.full = not self.trace.add(watched.trace, routing)
            if watched.full:
                self._calls.warn(
                    f"the trace has reached its limit of {self.trace.limit} tokens of each layer; later ones are "
                    "counted, but not recorded: watch(..., record=True, limit=N) keeps N of them"
                )

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


def watch(engine: Engine, model: nn.Module, record: bool = False, limit: int = LIMIT) -> Watcher:
    """Compute the engine's metrics and verdict for the MoE blocks of a transformers model, without changing it.

        with watch(engine, model) as watcher:
            model(input_ids, attention_mask=mask)
            print(watcher.metrics())

    model: a Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or DeepSeek-V3 of transformers, or a module that
    contains one, adapters (PEFT) included. The innermost module that is called with an `attention_mask` tells which
    tokens are padding; without a mask all tokens count, with a warning if only inner layers are watched or called. A
    forward repeated by activation checkpointing counts once, and copies of the model do not count. record: also keep a
    routing trace of the first `limit` tokens of each layer, padding included, for `watcher.write_routing(path)`.
    `watcher.labelled(labels)` gives the tokens classes. Raises UsageError for a model without such a block.
    """
    return Watcher(engine, model, record, limit)


def routing_of(block: Block, logits_TE: Tensor, expert_TK: Tensor, gate_TK: Tensor, tokens: Tokens) -> Routing:
    """A block's decision, by its router's logits and the choices and gates that its experts were given."""
    scores_TE = logits_TE.sigmoid() if block.family.sigmoid else logits_TE.softmax(-1)
    by_TE = scores_TE if block.bias is None else scores_TE + block.bias
    order_TK = by_TE.gather(1, expert_TK).argsort(dim=-1, descending=True, stable=True)  # not every block sorts
    plan = assign(gate_TK.gather(1, order_TK), expert_TK.gather(1, order_TK), tokens)
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-30)
    level = Level("expert", logits_TE, logits_TE, tokens, bias=block.bias)
    return Routing(tokens, (level,), probs_TE, plan, logits_TE.shape[1], expert_TK.shape[1])


def labels_of(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[T]: the label of each token of a forward of [B, S]. labels: [B] or [B, S]. Raises UsageError."""
    if tuple(labels.shape) not in (shape, shape[:1]):
        message = (
            f"labels of {list(labels.shape)} do not fit a forward of {list(shape)} tokens; "
            "give one of each sequence, or one of each token"
        )
        raise UsageError(message, code="labels-do-not-fit")
    rest = (1,) * (len(shape) - labels.dim())
    return labels.reshape(*labels.shape, *rest).expand(shape).reshape(-1)


def _told(value: Any) -> str:
    return f"a tensor of {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _follow(calls: Calls, model: nn.Module, blocks: list[nn.Module]) -> list[RemovableHandle]:
    """Follow the forwards of the blocks and of the modules around them."""
    around = [module for module in model.modules() if any(part in blocks for part in module.modules())]
    return [handle for module in around for handle in calls.follow(module)]


def _trace(block: Block, spec: Spec) -> LayerTrace:
    """An empty trace of a block. Its router is the strategy that decides alike, or else the block's class."""
    bias_E = block.bias
    like = block.family.decides_like(block, spec.top_k)
    router, options = like or (type(block.module).__name__, {})
    value = {"level": "expert", "name": "e_score_correction_bias", "selection_only": True}
    biases = [] if bias_E is None else [{**value, "value": bias_E.detach().cpu().float().clone()}]
    return LayerTrace(block.name, router, options, spec, {}, biases)
