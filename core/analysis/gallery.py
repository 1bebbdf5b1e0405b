"""The gallery of a run: what each expert gets, in pictures and words.

Suffixes: B samples, S tokens of each, T tokens, K choices of a token, E experts, G groups: classes or token ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract.numerics import mutual_information
from ..contract.run import Run
from ..pages.blocks import Card, Cards, Note, Page, Section, fact
from ..pages.page import html_of
from ..pages.pictures import png
from ..run.sample import FILE, Sample, SampledLayer, read_sample
from .usage import characteristic_tokens

PICTURES, TOKENS, CONTEXTS, CLASSES = 8, 8, 3, 3  # of an expert
BEFORE, AFTER = 24, 12  # tokens around one
MOST_CARDS, MOST_PICTURES = 1200, 3000  # of a page, so that it stays below 3 MB

Content = dict[str, Any]  # arguments of a card


def gallery_page(run: Run) -> str:
    """What each expert of a run gets, as one self-contained HTML file, from the sample that the run kept.

    For each layer and expert: the images with the largest gates and the mean image, weighted by gate; or the most
    characteristic tokens (`characteristic_tokens`) and the places with the largest gates; its classes; D(expert) = sum
    p(c | expert) log2 p(c | expert) / p(c) over classes or tokens c, in bits and minus its bias; and the nearest expert
    by CKA (`SampledLayer`). Without a sample the page says so. Raises UsageError for a damaged one.

    Sources: DeWeese and Meister, 1999 (How to Measure the Information Gained from One Symbol); Miller, 1955 (Note on
    the Bias of Information Estimates).
    """
    return html_of(_page(run))


def _page(run: Run) -> Page:
    about = f"{run.name}: {run.config.get('run', {}).get('task', '')}, {run.typed}"
    if not (run.folder / FILE).is_file():
        why = "This run kept no sample of the test set (--no-sample), from which a gallery is made."
        return Page(about, "no sample", [Section("Experts", [Note(why)])])
    sample = read_sample(run.folder)
    shown: list[SampledLayer] = []
    room = MOST_CARDS
    for layer in sample.layers:
        room -= layer.experts
        if room >= 0 or not shown:
            shown.append(layer)
    facts = [fact(len(sample.rows), "sample"), fact(len(sample.layers), "layer")]
    left = len(sample.layers) - len(shown)
    notes = [f"To stay small, this page leaves out {left} of {len(sample.layers)} layers."] if left else []
    if sample.images is None and sample.texts is None:
        notes.append("The task does not say what people see of its data (Task.show), so there are only numbers.")
    pictures = max(1, min(PICTURES, MOST_PICTURES // sum(layer.experts for layer in shown)))
    sections = [_section(run, sample, layer, pictures, layer is not shown[0]) for layer in shown]
    return Page(about, "What each expert gets", sections, facts=facts, notes=notes)


def _section(run: Run, sample: Sample, layer: SampledLayer, pictures: int, folded: bool) -> Section:
    """A layer: a card for each expert. pictures: that a card shows at most."""
    what, names, counts_GE = _groups(run, sample, layer)
    known: dict[str, Any] = next((one for one in run.summary["layers"] if one["name"] == layer.name), {})
    shares = known.get("load") or [None] * layer.experts
    bits = [_bits(counts_GE, expert) for expert in range(layer.experts)]
    contents: Iterable[Content] = [{} for _ in range(layer.experts)]
    reading = []
    if sample.images is not None:
        contents = _pictures(sample.images, layer, pictures)
        reading = ["Below an image: its class, if known, and gate."]
    elif texts := _texts(sample, layer):
        contents = _words(texts, layer)
        reading = ["Point at a token for its lift, and at a place for its gate."]
    cards = []
    for expert, content in enumerate(contents):
        lines = [_numbers(layer, shares[expert], bits[expert], what, expert)]
        lines += _classes(names, counts_GE, expert) if what == "class" else []
        cards.append(Card(f"expert {expert}", expert, lines + content.pop("lines", []), **content))
    note = " ".join([*_together(layer, what, counts_GE, bits), *reading])
    return Section(f"Layer {layer.name}", [Cards(cards)], note, folded)


def _texts(sample: Sample, layer: SampledLayer) -> list[list[str]]:
    """The texts of the layer's tokens; none if there is not one for each."""
    texts = sample.texts or []
    return texts if all(len(tokens) == layer.expert.shape[1] for tokens in texts) else []


def _numbers(layer: SampledLayer, share: float | None, bits: float | None, what: str, expert: int) -> str:
    """What is measured of an expert, in a line."""
    found = [] if share is None else [f"{_percent(share)} of the load"]
    found += [] if bits is None else [f"{bits:.2f} bits about the {what}"]
    if layer.nearest is not None and layer.cka is not None and layer.nearest[expert] >= 0:
        found.append(f"nearest: {int(layer.nearest[expert])} (CKA {float(layer.cka[expert]):.3f})")
    return "; ".join(found)


def _together(layer: SampledLayer, what: str, counts_GE: Tensor, bits: Sequence[float | None]) -> Iterator[str]:
    """What stands out in a layer, in sentences."""
    busy = (counts_GE.sum(0) * 2 >= counts_GE.sum() / layer.experts).tolist()
    known = {expert: value for expert, value in enumerate(bits) if value is not None and busy[expert]}
    if known and max(known.values()):
        most = max(known, key=lambda expert: known[expert])
        what_for = f"its choice tells {known[most]:.2f} bits about the {what}"
        yield f"Expert {most} is the most exclusive of those with at least half an even share: {what_for}."
        together = f"{float(mutual_information(counts_GE)):.3f} (0: independent, 1: one tells the other)"
        yield f"Mutual information of {what} and expert: {together}."
    if layer.nearest is not None and layer.cka is not None and not layer.cka.isnan().all():
        one = int(layer.cka.nan_to_num(-1).argmax())
        alike = f"CKA {float(layer.cka[one]):.3f} (1: equal outputs, or rotated and scaled ones)"
        yield f"Experts {one} and {int(layer.nearest[one])} are the most alike: {alike}."


def _groups(run: Run, sample: Sample, layer: SampledLayer) -> tuple[str, Sequence[object], Tensor]:
    """(what tokens are grouped by, the names of the groups, counts [G, E]): by class if it is known, or by token."""
    tables = [
        record["layers"].get(layer.name, {}).get("class_expert") for record in run.records if record["split"] == "eval"
    ]
    if tables and tables[-1] and len(tables[-1][0]) == layer.experts:
        return "class", range(len(tables[-1])), torch.tensor(tables[-1], dtype=torch.float64)
    if layer.labels is not None and layer.labels.max() >= 0:
        classes = int(layer.labels.max()) + 1
        return "class", range(classes), layer.counts(layer.labels, classes).double()
    if texts := _texts(sample, layer):
        known, id_BS = _ids(texts)
        return "token", known, layer.counts(id_BS, len(known)).double()
    return "", (), torch.zeros(0, layer.experts)


def _ids(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """(the different texts, [B, S]: the index of each)."""
    known = sorted({text for tokens in texts for text in tokens})
    places = {text: at for at, text in enumerate(known)}
    return known, torch.tensor([[places[text] for text in tokens] for tokens in texts])


def _bits(counts_GE: Tensor, expert: int) -> float | None:
    """D(expert) in bits, minus its bias, at least 0; None without a choice."""
    if not counts_GE[:, expert].sum():
        return None
    count_G, all_G = counts_GE[:, expert], counts_GE.sum(1)
    p_G, q_G = count_G / count_G.sum(), all_G / all_G.sum()
    bits = torch.special.xlogy(p_G, p_G / q_G.clamp(min=1e-300)).sum() / torch.tensor(2.0).log()
    bias = ((count_G > 0).sum() - 1) / (2 * count_G.sum() * torch.tensor(2.0).log())
    return float((bits - bias).clamp(min=0))


def _classes(names: Sequence[object], counts_GE: Tensor, expert: int) -> list[str]:
    """The classes that an expert gets most, in a sentence."""
    count_G = counts_GE[:, expert]
    if not count_G.sum():
        return []
    best = count_G.argsort(descending=True, stable=True)[:CLASSES].tolist()
    shares = (f"{names[at]} ({_percent(float(count_G[at] / count_G.sum()))})" for at in best if count_G[at])
    return [f"classes: {', '.join(shares)}"]


def _pictures(images: Tensor, layer: SampledLayer, most: int) -> Iterator[Content]:
    """The mean image of each expert and those with the largest gates, as arguments of its card."""
    gates_BE = layer.gates()
    for expert in range(layer.experts):
        gate_B = gates_BE[:, expert]
        if not gate_B.any():
            yield {"lines": ["no image of the sample"]}
            continue
        weight = gate_B.view(-1, *[1] * (images.dim() - 1))
        mean = ((images * weight).sum(0) / weight.sum()).round().to(torch.uint8)
        best = [at for at in gate_B.argsort(descending=True, stable=True)[:most].tolist() if gate_B[at] > 0]
        shots = [(png(images[at].numpy()), f"{_label(layer, at)}{float(gate_B[at]):.2f}") for at in best]
        yield {"pictures": [(png(mean.numpy()), "mean"), *shots]}


def _label(layer: SampledLayer, at: int) -> str:
    """The class of an image, if it is known, before its gate."""
    return "" if layer.labels is None or layer.labels.shape[1] != 1 else f"{int(layer.labels[at, 0])}: "


def _words(texts: Sequence[Sequence[str]], layer: SampledLayer) -> Iterator[Content]:
    """The characteristic tokens of each expert and the places with its largest gates, as arguments of its card."""
    known, id_BS = _ids(texts)
    expert_TK = layer.expert.flatten(0, 1).long().numpy()
    found = characteristic_tokens(id_BS.flatten().numpy(), expert_TK, layer.experts, TOKENS)
    for expert in range(layer.experts):
        gate_BS = torch.where(layer.expert == expert, layer.gate.float(), 0).sum(-1)
        contexts = [*_contexts(texts, gate_BS)]
        tokens = [
            (known[one["id"]], f"lift {one['lift']:.1f}: {one['count']} of {one['of']} chose this expert")
            for one in found[expert]
        ]
        yield {"tokens": tokens, "contexts": contexts, "lines": [] if contexts else ["no token of the sample"]}


def _contexts(texts: Sequence[Sequence[str]], gate_BS: Tensor) -> Iterator[tuple[str, str, str, str]]:
    """The places with the largest gates, each of another token."""
    told: set[str] = set()
    length = gate_BS.shape[1]
    for place in gate_BS.flatten().argsort(descending=True, stable=True).tolist():
        row, at = divmod(place, length)
        gate, tokens = float(gate_BS[row, at]), texts[row]
        if not gate or len(told) == CONTEXTS:
            return
        if tokens[at] not in told:
            told.add(tokens[at])
            before, after = "".join(tokens[max(at - BEFORE, 0) : at]), "".join(tokens[at + 1 : at + 1 + AFTER])
            yield before, tokens[at], after, f"gate {gate:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
