"""Metrics for the MoE blocks of transformers models, without changing them or importing transformers."""

import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..analysis.counted_layer import CountedLayer
from ..contract.routing import Level, Routing, Spec, Tokens, assign
from ..contract.stats import Metrics
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..registry.manager import Plugins
from ..run.traces import LayerTrace, Trace


@attrs.frozen
class Family:
    """How a family's block scores experts. wide: logits in fp32. sigmoid: sigmoid scores instead of a softmax."""

    name: str
    wide: bool = False
    sigmoid: bool = False


BLOCKS = {  # by class name; all pass the hidden states, the chosen experts and their weights to `experts`
    "MixtralSparseMoeBlock": Family("Mixtral"),
    "OlmoeSparseMoeBlock": Family("OLMoE"),
    "Qwen2MoeSparseMoeBlock": Family("Qwen2-MoE"),
    "Qwen3MoeSparseMoeBlock": Family("Qwen3-MoE"),
    "DeepseekV2Moe": Family("DeepSeek-V2", wide=True),
    "DeepseekV3MoE": Family("DeepSeek-V3", wide=True, sigmoid=True),
}


@attrs.define(eq=False)
class Call:
    """The arguments of the model's present forward. mask, ids: as given, or None. shape: [B, S] of its tokens."""

    mask: Tensor | None = None
    ids: Tensor | None = None
    shape: tuple[int, ...] = ()


class Watcher:
    """Counts the choices of each MoE block of a model until `close()`; returned by `watch`.

    plugins: the metrics to compute. record: keep a routing trace, for `write_routing`. Raises UsageError for a
    model without a known block.
    """

    def __init__(self, plugins: Plugins, model: nn.Module, record: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"watch() takes a model, not {model!r}", code="not-a-model")
        found = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if type(module).__name__ in BLOCKS
        }
        if not found:
            known = listed(family.name for family in BLOCKS.values())
            raise UsageError(
                f"{type(model).__name__} has no block that can be watched; known are those of {known} in "
                "transformers; for layers of engine.moe() call engine.metrics()",
                code="no-known-block",
            )
        self._layers = {name: CountedLayer(plugins, name, _spec(block)) for name, block in found.items()}
        self._traces = {name: _trace(name, block) for name, block in found.items()} if record else {}
        self._trace = Trace(list(self._traces.values()), {"model": type(model).__name__})
        self._call = Call()
        signature = inspect.signature(model.forward)
        self._handles = [
            model.register_forward_pre_hook(partial(self._begin, signature), with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for name, block in found.items():
            experts: Any = block.experts
            self._handles.append(
                experts.register_forward_pre_hook(torch.compiler.disable(partial(self._count, name, block)))
            )

    # -- for the user ----------------------------------------------------------------------------

    def metrics(self) -> dict[str, Metrics]:
        """All metrics of each block since the last call, by the block's name in the model.

        Forwards count both in training and in eval mode. A block that saw no real token has the verdict "no data".
        With several processes, each counts its own tokens.
        """
        return {name: layer.metrics() for name, layer in self._layers.items()}

    def write_routing(self, path: str | Path) -> None:
        """Write the recorded trace for `moe-engine replay`. Raises UsageError if nothing was recorded."""
        if not self._traces:
            raise UsageError("nothing was recorded; call watch(engine, model, record=True)", code="nothing-recorded")
        self._trace.write(Path(path))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the hooks -------------------------------------------------------------------------------

    def _begin(self, signature: inspect.Signature, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward: note its mask and token ids."""
        given = signature.bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        mask, ids, embedded = (given.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            warnings.warn("an attention_mask that is not [B, S] is ignored: all tokens count", stacklevel=2)
            mask = None
        shape = ids.shape if ids is not None else embedded.shape[:2] if embedded is not None else ()
        self._call = Call(mask, ids, tuple(shape))

    def _end(self, *_: Any) -> None:
        self._call = Call()  # a part of the model may be called alone, and then has no mask

    @torch.no_grad()
    def _count(self, name: str, block: Any, _: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        """Before the forward of a block's experts: count its decision."""
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running, so this is activation checkpointing repeating the forward
        routing = routing_of(block, *args, self._call, self._layers[name].spec)
        self._layers[name].count(routing)
        if self._traces:
            self._trace.add(self._traces[name], routing)


def watch(engine: Engine, model: nn.Module, record: bool = False) -> Watcher:
    """Compute the engine's metrics and verdict for the MoE blocks of a transformers model, without changing it.

        with watch(engine, model) as watcher:
            model(input_ids, attention_mask=mask)
            print(watcher.metrics())

    model: a Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or DeepSeek-V3 of transformers, or a module that
    contains one. Call the whole model: the `attention_mask` [B, S] of its forward tells which tokens are padding;
    without a mask all tokens count. A forward repeated by activation checkpointing counts once. record: also keep a
    routing trace, for `watcher.write_routing(path)`. Raises UsageError for a model without such a block.
    """
    return Watcher(engine.plugins, model, record)


def routing_of(block: Any, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, call: Call, spec: Spec) -> Routing:
    """A block's decision: the choices and gates passed to its experts, and its logits, recomputed as the block does.

    x_TD: the block's input. expert_TK, gate_TK: the chosen experts and their weights.
    """
    family = BLOCKS[type(block).__name__]
    dtype = torch.float32 if family.wide else x_TD.dtype
    logits_TE = nn.functional.linear(x_TD.to(dtype), block.gate.weight.to(dtype)).float()
    scores_TE = logits_TE.sigmoid() if family.sigmoid else logits_TE.softmax(-1)
    bias_E = _bias(block)
    tokens = _tokens(x_TD, call)
    by_TE = scores_TE if bias_E is None else scores_TE + bias_E
    order_TK = by_TE.gather(1, expert_TK).argsort(dim=-1, descending=True, stable=True)  # not every block sorts
    plan = assign(gate_TK.gather(1, order_TK), expert_TK.gather(1, order_TK), tokens)
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-30)
    level = Level("expert", logits_TE, logits_TE, tokens, bias=bias_E)
    return Routing(tokens, (level,), probs_TE, plan, spec.experts, spec.top_k)


def _tokens(x_TD: Tensor, call: Call) -> Tokens:
    """The tokens of a forward. With a cache the mask also covers earlier tokens; these are the last ones."""
    count, mask, ids, shape = x_TD.shape[0], call.mask, call.ids, call.shape
    if mask is not None and count % len(mask) == 0 and count <= mask.numel():
        shape = (len(mask), count // len(mask))
        mask = mask[:, -shape[1] :].reshape(-1).bool().to(x_TD.device)
    else:
        mask = None
    ids = ids.reshape(-1).to(x_TD.device) if ids is not None and ids.numel() == count else None
    fits = len(shape) == 2 and shape[0] * shape[1] == count
    tokens = Tokens(x_TD.detach(), shape if fits else (count,), mask)
    tokens.x, tokens.ids = tokens.real(tokens.x), None if ids is None else tokens.real(ids)
    return tokens


def _bias(block: Any) -> Tensor | None:
    """The bias [E] that DeepSeek-V3 adds to its scores to select experts."""
    bias: Tensor | None = getattr(block.gate, "e_score_correction_bias", None)
    return bias


def _spec(block: Any) -> Spec:
    experts, dim = block.gate.weight.shape
    top_k = getattr(block.gate, "top_k", None) or block.top_k
    hidden = getattr(block.experts, "intermediate_dim", 0)
    return Spec(dim, hidden, experts=experts, top_k=top_k, activation="swiglu", causal=True)


def _trace(name: str, block: Any) -> LayerTrace:
    """An empty trace of a block."""
    bias_E = _bias(block)
    value = {"level": "expert", "name": "e_score_correction_bias", "selection_only": True}
    biases = [] if bias_E is None else [{**value, "value": bias_E.detach().cpu().float().clone()}]
    return LayerTrace(name, type(block).__name__, {}, _spec(block), {}, biases)
