"""What an inspection found, in numbers: health of each layer, labels against each other, tokens of each expert.

Suffixes: C labels, T tokens, K chosen per token, E experts.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis.count_series import Series
from ..analysis.routing_stats import row_of
from ..analysis.usage import by_chance, characteristic_tokens, divergences, lifts
from ..errors import visible
from ..registry.manager import Plugins
from .inspecting import EngineInspector, Inspector, Layer, Passage
from .words import Words

TOKENS, CONTEXTS = 8, 3  # of each expert
BEFORE, AFTER = 12, 6  # tokens of a context
SAMPLE = 320  # tokens of each label that are shown whole
FOND = 1.2  # lift from which a label is said to prefer an expert
NUMBERS = ("active", "cv", "cv2", "gini", "entropy", "max_min", "maxvio")

Array = NDArray[Any]


def report_of(
    inspector: Inspector | EngineInspector,
    passages: Sequence[Passage],
    labels: Sequence[str],
    tokenizer: Any,
    about: dict[str, Any],
) -> dict[str, Any]:
    """All numbers, as JSON can hold them. about: what was inspected.

    A layer has the metrics and the verdict of its counts; `router`: how sure it is; `labels`: the load of each, its
    metrics, its lift by expert; `divergence` and `by_chance` [C, C] in bits; `experts`: characteristic tokens and
    contexts of each. findings: the layers that are not healthy, the worst first.
    """
    label_T = np.concatenate([np.full(len(passage.id_T), passage.label) for passage in passages])
    words, layers = Words(tokenizer), inspector.layers
    rows = [_layer(layer, passages, label_T, labels, words) for layer in layers]
    tokens_C = np.bincount(label_T, minlength=len(labels)).tolist()
    return {
        **about,
        "tokens": len(label_T),
        "texts": [
            {"file": one.name, "label": labels[one.label], "tokens": len(one.id_T), "cut": one.cut} for one in passages
        ],
        "labels": dict(zip(labels, tokens_C, strict=True)),
        "silent": inspector.silent,
        "findings": findings(rows),
        "layers": rows,
        "sample": _sample(layers, passages, labels, words),
    }


def counts_of(layer: Layer, label_T: Array, labels: int) -> Array:
    """[C, E]: the assignments of each label to each expert."""
    pair_TK = label_T[:, None] * layer.experts + layer.expert_TK
    return np.bincount(pair_TK.ravel(), minlength=labels * layer.experts).reshape(labels, layer.experts)


def findings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts of layers, the worst first: by severity, then by cv."""
    told = [{"layer": row["layer"], "cv": row["cv"], **row["verdict"]} for row in rows if row["verdict"]]
    return sorted(told, key=lambda one: (-one["severity"], -(one["cv"] or 0)))


def _layer(
    layer: Layer, passages: Sequence[Passage], label_T: Array, labels: Sequence[str], words: Words
) -> dict[str, Any]:
    count_CE = counts_of(layer, label_T, len(labels)).astype(float)
    id_T = np.concatenate([passage.id_T for passage in passages])
    lift_CE, plugins = lifts(count_CE), Plugins()
    row = {"layer": layer.name, "experts": layer.experts, "top_k": layer.top_k}
    row |= _balance(plugins, layer, count_CE.sum(0), len(label_T)) | {"router": layer.sure()}
    row["labels"] = {
        name: {
            **_balance(plugins, layer, count_CE[at], int((label_T == at).sum())),
            "lift": [None if np.isnan(value) else float(value) for value in lift_CE[at]],
        }
        for at, name in enumerate(labels)
    }
    row["divergence"], row["by_chance"] = divergences(count_CE).tolist(), by_chance(count_CE).tolist()
    tokens = characteristic_tokens(id_T, layer.expert_TK, layer.experts, TOKENS)
    row["of_experts"] = [
        {
            "tokens": [{"token": words.of(one["id"]), **one} for one in tokens[expert]],
            "contexts": [*_contexts(layer, expert, passages, id_T, labels, words)],
        }
        for expert in range(layer.experts)
    ]
    return row


def _balance(plugins: Plugins, layer: Layer, count_E: Array, tokens: int) -> dict[str, Any]:
    """Metrics and the verdict of counts: those of `routing-stats`."""
    row, _ = row_of(plugins, Series("", {}, layer.name, "", count_E, tokens, layer.top_k))
    count = {"tokens": tokens, "counts": count_E.astype(int).tolist()}
    return {**count, **{name: row.get(name) for name in ("load", *NUMBERS, "verdict")}}


def _contexts(
    layer: Layer, expert: int, passages: Sequence[Passage], id_T: Array, labels: Sequence[str], words: Words
) -> Iterator[dict[str, Any]]:
    """Where an expert was chosen with the largest probability; different tokens first."""
    starts = np.cumsum([0, *(len(passage.id_T) for passage in passages)])
    places = layer.places(expert)
    firsts = {int(id_T[place]): (place, sure) for place, sure in reversed(places)}
    chosen = sorted(firsts.values(), key=lambda one: -one[1])
    chosen += [one for one in places if one not in chosen]
    for place, sure in chosen[:CONTEXTS]:
        at = int(np.searchsorted(starts, place, side="right")) - 1
        first, last = max(starts[at], place - BEFORE), min(starts[at + 1], place + 1 + AFTER)
        yield {
            "label": labels[passages[at].label],
            "before": words.text(id_T[first:place]),
            "token": words.of(int(id_T[place])),
            "after": words.text(id_T[place + 1 : last]),
            "probability": sure,
        }


def _sample(
    layers: Sequence[Layer], passages: Sequence[Passage], labels: Sequence[str], words: Words
) -> list[dict[str, Any]]:
    """The first tokens of each label's first passage, and for every layer the experts and gates of each token."""
    starts = np.cumsum([0, *(len(passage.id_T) for passage in passages)])
    out = []
    for label, name in enumerate(labels):
        at = next(at for at, passage in enumerate(passages) if passage.label == label)
        id_T = passages[at].id_T[:SAMPLE]
        here = slice(starts[at], starts[at] + len(id_T))
        experts = [layer.expert_TK[here].tolist() for layer in layers]
        gates = [np.round(layer.gate_TK[here].astype(float), 4).tolist() for layer in layers]
        tokens = [words.of(int(token)) for token in id_T]
        out.append({"label": name, "tokens": tokens, "experts": experts, "gates": gates})
    return out


# -- labels in words -----------------------------------------------------------------------------------------


def contrasts(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each pair of labels the layer in which they differ most."""
    for (a, one), (b, other) in combinations(enumerate(report["labels"]), 2):
        bits, layer, chance = max(
            (row["divergence"][a][b], row["layer"], row["by_chance"][a][b]) for row in report["layers"]
        )
        yield {"pair": (one, other), "layer": layer, "bits": bits, "by_chance": chance}


def preferences(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each label the expert of all layers with its largest lift, at least `FOND`, among those with a fair share."""
    for name in report["labels"]:
        found = [
            {"label": name, "layer": row["layer"], "expert": expert, "lift": lift, "share": share}
            for row in report["layers"]
            for expert, (lift, share) in enumerate(
                zip(row["labels"][name]["lift"], row["labels"][name]["load"], strict=True)
            )
            if lift is not None and lift >= FOND and share * row["experts"] >= 1
        ]
        if found:
            yield max(found, key=lambda one: one["lift"])


def counts_csv(report: dict[str, Any]) -> str:
    """The counts of each layer and label, as `moe-engine routing-stats` reads them."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["layer", "split", "expert", "count", "tokens", "choices_per_token"])
    for row in report["layers"]:
        for name, one in row["labels"].items():
            for expert, count in enumerate(one["counts"]):
                table.writerow([row["layer"], visible(name), expert, count, one["tokens"], row["top_k"]])
    return out.getvalue()
