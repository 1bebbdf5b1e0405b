"""Inspect a mixture: run texts through it, and keep what each of its layers decides about every token.

Suffixes: T tokens, E experts, K chosen per token, M best places of an expert.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..contract.routing import Routing
from ..engine.engine import Engine
from ..errors import RunError, UsageError
from ..files import check_file
from ..layer.probing import uncounted
from ..run.traces import Trace, begin
from .loading import finite
from .watching import Watched, Watcher

PLACES = 12  # most probable places of each expert that are kept, to choose contexts from
WIDEST = 32  # characters of a token at most, to know how much of a long file to read
DIFFER = 0.01  # share of choices up to which a margin is still that of the top K

Array = NDArray[Any]


@attrs.frozen(eq=False)
class Passage:
    """A text as token ids [T]. name: of its file. label: an index. cut: the file has more tokens."""

    name: str
    label: int
    id_T: Array
    cut: bool


def read_passages(tokenizer: Any, files: Sequence[Path], labels: Sequence[int], most: int) -> list[Passage]:
    """The first `most` tokens of each file, as the tokenizer encodes it. Raises UsageError."""
    return [_passage(tokenizer, file, label, most) for file, label in zip(files, labels, strict=True)]


def _passage(tokenizer: Any, file: Path, label: int, most: int) -> Passage:
    try:
        check_file(file)
        with open(file, encoding="utf-8", newline="") as opened:
            text = opened.read(WIDEST * most)
            more = bool(opened.read(1))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text; convert it, or name another file", code="not-text") from error
    except OSError as error:
        raise UsageError(f"text {file} can't be read: {error.strerror}", code="unreadable-text") from error
    id_T = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    if not text or not len(id_T):
        raise UsageError(f"text {file} is empty; name one with tokens", code="empty-text")
    return Passage(str(file), label, id_T[:most], more or len(id_T) > most)


@attrs.define(eq=False)
class Layer:
    """What one layer decided, token by token in the order of the passages.

    choices, gates: [T, K] of each forward, best first. tokens: their number. sums: over tokens, of the largest
    probability, of the entropy in nats and of the margin. differing: choices that are not among the top K of the
    scores. sure_EM, place_EM: an expert's most probable tokens, and where they are.
    """

    name: str
    experts: int
    top_k: int
    choices: list[Array] = attrs.field(factory=list)
    gates: list[Array] = attrs.field(factory=list)
    tokens: int = 0
    sums: Array = attrs.field(factory=lambda: np.zeros(3))
    differing: int = 0
    sure_EM: Tensor = attrs.field(init=False)
    place_EM: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sure_EM = torch.full((self.experts, PLACES), -1.0)
        self.place_EM = torch.full((self.experts, PLACES), -1)

    @property
    def expert_TK(self) -> Array:
        """[T, K]: the chosen experts, best first."""
        return np.concatenate(self.choices)

    @property
    def gate_TK(self) -> Array:
        """[T, K]: the gate of each choice, in half precision, to be looked at."""
        return np.concatenate(self.gates)

    def sure(self) -> dict[str, float | None]:
        """How sure the router is: the mean of the largest probability, of the entropy over ln E, and of the margin."""
        top, entropy, margin = self.sums / max(self.tokens, 1)
        known = self.top_k < self.experts and self.differing <= DIFFER * self.tokens * self.top_k
        flat = np.log(self.experts)
        numbers = {
            "top_probability": top,
            "router_entropy": entropy / flat if flat else np.nan,
            "margin": margin if known else np.nan,
        }
        return {name: float(value) if np.isfinite(value) else None for name, value in numbers.items()}

    def add(self, routing: Routing, scores_TE: Tensor | None) -> None:
        """Add one forward. scores_TE: what the choice took the top K of, or None. Raises UsageError."""
        probs_TE, plan = routing.probs, routing.plan
        if probs_TE is None or plan.each != self.top_k:
            sentence = f"the router of {self.name} gives tokens no probabilities, or varying numbers of experts"
            raise UsageError(f"{sentence}; inspect reads routers with a top K", code="not-a-top-k")
        expert_TK = plan.expert.view(len(probs_TE), self.top_k)
        self.choices.append(expert_TK.cpu().numpy().astype(np.int32))
        gate_TK = plan.weight.detach().view_as(expert_TK).float()
        self.gates.append(gate_TK.cpu().numpy().astype(np.float16))
        best_TK = (probs_TE if scores_TE is None else scores_TE).topk(min(self.top_k + 1, self.experts), dim=-1).values
        margin_T = best_TK[:, self.top_k - 1] - best_TK[:, -1]
        if scores_TE is None:
            self.differing += expert_TK.numel()
        else:
            self.differing += int((scores_TE.gather(1, expert_TK) < best_TK[:, self.top_k - 1, None]).sum())
        entropy_T = -torch.special.xlogy(probs_TE, probs_TE).sum(-1)
        for at, value_T in enumerate((probs_TE.amax(-1), entropy_T, margin_T)):
            self.sums[at] += float(value_T.double().sum())
        self._keep_places(probs_TE.cpu(), expert_TK.cpu())
        self.tokens += len(probs_TE)

    def _keep_places(self, probs_TE: Tensor, expert_TK: Tensor) -> None:
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, expert_TK, True)
        sure_ET = torch.where(chosen_TE, probs_TE, -1.0).float().T
        place_ET = torch.arange(self.tokens, self.tokens + len(probs_TE)).expand_as(sure_ET)
        self.sure_EM, at_EM = torch.cat([self.sure_EM, sure_ET], 1).topk(PLACES, dim=1)
        self.place_EM = torch.cat([self.place_EM, place_ET], 1).gather(1, at_EM)

    def places(self, expert: int) -> list[tuple[int, float]]:
        """Where this expert was chosen with the largest probability, and that; the largest first."""
        pairs = zip(self.place_EM[expert].tolist(), self.sure_EM[expert].tolist(), strict=True)
        return [(place, sure) for place, sure in pairs if sure >= 0]


class Inspector(Watcher):
    """A watcher that keeps every choice, and how sure the router was.

    layers: those that have decided, by name in the order of the model.
    """

    def __init__(self, model: Any, labels: int, record: bool, limit: int) -> None:
        self._kept: dict[str, Layer] = {}
        super().__init__(Engine(classes=labels), model, record=record, limit=limit)

    def decide(self, forward: Callable[[], object], label: int) -> None:
        """Run a forward of tokens with this label."""
        with self.labelled(label):
            forward()

    def _take(self, watched: Watched, routing: Routing) -> None:
        super()._take(watched, routing)
        name = watched.block.name
        if name not in self._kept:
            self._kept[name] = Layer(name, routing.experts, routing.top_k)
        (level,) = routing.levels
        scores_TE = watched.block.family.score(level.logits)
        self._kept[name].add(routing, scores_TE if level.bias is None else scores_TE + level.bias)

    @property
    def layers(self) -> list[Layer]:
        return [self._kept[name] for name in self._watched if name in self._kept]

    @property
    def silent(self) -> list[str]:
        """The blocks that no token has reached."""
        return [name for name in self._watched if name not in self._kept]


class EngineInspector:
    """The same for a model whose layers are an engine's, as in a run of task causal_lm. Nothing is counted."""

    def __init__(self, engine: Engine, model: Any, record: bool, limit: int) -> None:
        self._engine, self._record = engine, record
        self.layers = [Layer(layer.name, layer.spec.experts, layer.spec.top_k) for layer in engine.layers]
        if not self.layers:
            raise UsageError(f"{type(model).__name__} has no layers of experts to inspect", code="no-blocks")
        self.trace = Trace([begin(engine, layer) for layer in engine.layers], {"model": type(model).__name__}, limit)
        self.silent: list[str] = []

    def decide(self, forward: Callable[[], object], label: int) -> None:
        """Run a forward of tokens with this label."""
        with uncounted(self._engine.layers):
            forward()
            decided = [layer.watched or [] for layer in self._engine.layers]
        for kept, recorded, routings in zip(self.layers, self.trace.layers, decided, strict=True):
            for routing in routings:
                level, *more = routing.levels or (None,)
                scores_TE = None if level is None or more else level.scores
                if level is not None and scores_TE is not None and level.bias is not None:
                    scores_TE = scores_TE + level.bias
                kept.add(routing, scores_TE)
                if self._record:
                    tokens = routing.tokens
                    label_T = torch.full((tokens.x.shape[0],), label)
                    tokens = attrs.evolve(tokens, labels=label_T, lots=tokens.lots)
                    self.trace.add(recorded, attrs.evolve(routing, tokens=tokens))


def inspect(
    model: Any,
    passages: Sequence[Passage],
    labels: Sequence[str],
    length: int,
    batch: int,
    record: bool = False,
    progress: Callable[[Sequence[Any]], Any] = iter,
    engine: Engine | None = None,
) -> Inspector | EngineInspector:
    """Run passages through a language model in windows of `length` tokens, `batch` windows at a time, unpadded.

    record: also keep a trace of all of it, with the labels. progress: wraps the batches. engine: whose layers the model
    has, of a run. Raises UsageError for a model without a known block, or whose layers do not see every token, and
    RunError if the model fails.
    """
    _check_ids(model, passages)
    total = sum(len(passage.id_T) for passage in passages)
    inspector = (
        Inspector(model, len(labels), record, total)
        if engine is None
        else EngineInspector(engine, model, record, total)
    )
    inspector.trace.about["labels"] = list(labels)
    done = 0
    with torch.no_grad(), inspector if isinstance(inspector, Inspector) else nullcontext():
        for label, id_BS in progress([*_batches(passages, length, batch)]):
            inspector.decide(partial(_forward, model, id_BS), label)
            done += id_BS.size
            for layer in inspector.layers:
                if layer.tokens != done:
                    sentence = f"{layer.name} was given {layer.tokens} of {done} tokens"
                    raise UsageError(f"{sentence}; inspect reads layers that see every token", code="not-every-token")
    return inspector


def _check_ids(model: Any, passages: Sequence[Passage]) -> None:
    table = model.get_input_embeddings()
    known = getattr(table, "num_embeddings", None)
    highest = max(int(passage.id_T.max()) for passage in passages)
    if known is not None and highest >= known:
        sentence = f"the tokenizer has a token {highest}, but the model embeds {known}; give the folder the model's own"
        raise UsageError(sentence, code="tokenizer-does-not-fit")


def _batches(passages: Sequence[Passage], length: int, batch: int) -> Iterator[tuple[int, Array]]:
    """(label, ids [B, S]): windows of `length` tokens, and the rest of each passage alone."""
    for passage in passages:
        whole = len(passage.id_T) // length * length
        windows = iter(passage.id_T[:whole].reshape(-1, length))
        while some := [*islice(windows, batch)]:
            yield passage.label, np.stack(some)
        if whole < len(passage.id_T):
            yield passage.label, passage.id_T[None, whole:]


def _forward(model: Any, id_BS: Array) -> None:
    try:
        answer = model(input_ids=torch.from_numpy(id_BS).to(model.device), use_cache=False)
        finite(getattr(answer, "logits", answer[0]), model)
    except UsageError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        sentence = f"{type(model).__name__} fails on {id_BS.shape[0]} windows of {id_BS.shape[1]} tokens ({why})"
        raise RunError(f"{sentence}; try a smaller --batch or --length", code="model-failed") from error
