"""The page of an inspection: one HTML file that opens offline."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ..analysis.usage import LEAST
from ..errors import visible
from ..pages.blocks import Block, Card, Cards, Heat, Note, Page, Section, Table, fact, grouped, sentence
from ..pages.blocks import Words as Coloured
from ..pages.page import html_of
from ..run.forms import fixed, percent, shown
from .inspection import CONTEXTS, SAMPLE, TOKENS, contrasts, preferences

LARGEST = 3_000_000  # bytes of a page
CHOICES = 800_000  # bytes that the choices of the sampled tokens may take, at about 11 for each
PAIRS = 15  # of labels that one table compares
TOLD = 6  # pairs of labels that are told in words
COLUMNS = ("layer", "active", "cv", "maxvio", "entropy", "top prob", "router H", "margin", "labels", "verdict")


class Detail(NamedTuple):
    """How much is shown: tokens and contexts of each expert, layers with them, tokens of each text."""

    tokens: int
    contexts: int
    layers: int
    sample: int


# tried in turn until a page is small enough
DETAIL = (
    *(Detail(TOKENS, CONTEXTS, 1000, SAMPLE), Detail(6, 2, 48, SAMPLE), Detail(5, 1, 24, 160)),
    *(Detail(4, 0, 8, 80), Detail(3, 0, 2, 40)),
)
SURE = (
    "Entropies are 1 if all experts are equal. Top prob, router H and margin are means over tokens of how sure the "
    "router is: of its largest probability, of the entropy of its probabilities, and of the K-th score minus the next, "
    "which is - where the choice is not the top K of one list."
)
DIFFER = " Labels: the largest Jensen-Shannon divergence between two of them, in bits."
DIVERGENCE = (
    "The Jensen-Shannon divergence between the loads of two labels, in bits: 0 alike, 1 no expert in common. By "
    "chance: what two samples of one load would have."
)
EXPERTS = (
    "Tokens by lift: how much more often the expert is chosen by this token than by any, of tokens with {least} "
    "choices or more; point at one for its numbers. Contexts: where it was chosen with the largest probability."
)


def page_of(report: dict[str, Any], notes: Sequence[str]) -> str:
    """The page. notes: sentences for its head. Of a large model it shows less detail, and says so."""
    experts = max(row["experts"] for row in report["layers"])
    for detail in DETAIL:
        rows = min(detail.layers, len(report["layers"])) * experts
        if rows * (60 + 90 * detail.tokens + 250 * detail.contexts) > 2 * LARGEST and detail != DETAIL[-1]:
            continue  # far too large, by what a row takes
        text = html_of(_page(report, [*notes, *_left_out(report, detail)], detail))
        if len(text.encode()) < LARGEST:
            break
    return text


def layers_table(report: dict[str, Any]) -> Table:
    """The layers, for the terminal and the page."""
    rows, several = report["layers"], len(report["labels"]) > 1
    short = short_names([row["layer"] for row in rows])
    lines = []
    for row in rows:
        sure = row["router"]
        values = [row["cv"], row["maxvio"], row["entropy"], *sure.values(), farthest(row) if several else None]
        numbers = [shown("", value) for value in values]
        verdict = (row["verdict"] or {}).get("name", "-")
        lines.append([short[row["layer"]], f"{row['active']}/{row['experts']}", *numbers, verdict])
    tones = {one["name"]: one["severity"] for one in report["findings"]}
    return Table(COLUMNS, lines, (0, len(COLUMNS) - 1), tones=tones)


def label_lines(report: dict[str, Any]) -> Iterator[str]:
    """What is said of the labels, for the terminal and the page."""
    if len(report["labels"]) < 2:
        return
    pairs = sorted(contrasts(report), key=lambda one: -one["bits"])
    for one in pairs[:TOLD]:
        bits = f"{fixed(one['bits'], 3)} bits (by chance {fixed(one['by_chance'], 3)})"
        yield visible(f"{' and '.join(one['pair'])} differ most in {one['layer']}: {bits}")
    if len(pairs) > TOLD:
        yield f"and {len(pairs) - TOLD} more pairs of labels, which differ less; --json has all"
    for one in preferences(report):
        much = f"{one['lift']:.2g} times as often as all, {one['share']:.0%} of its choices"
        yield visible(f"{one['label']} prefers expert {one['expert']} of {one['layer']}: {much}")


def farthest(row: Mapping[str, Any]) -> float:
    """The largest divergence between two labels in a layer."""
    return max(float(bits) for of_label in row["divergence"] for bits in of_label)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts that all share: 3 of model.layers.3.mlp."""
    parts = [name.split(".") for name in names]
    if len({len(one) for one in parts}) > 1 or len(names) < 2:
        return {name: visible(name) for name in names}
    differing = [at for at, found in enumerate(zip(*parts, strict=True)) if len(set(found)) > 1]
    first, last = differing[0], differing[-1] + 1
    return {name: visible(".".join(one[first:last])) for name, one in zip(names, parts, strict=True)}


def _left_out(report: dict[str, Any], detail: Detail) -> list[str]:
    """What the page does not show, in a sentence."""
    shown_layers = min(detail.layers, len(report["layers"]))
    if detail[:2] == (TOKENS, CONTEXTS) and shown_layers == len(report["layers"]):
        return []
    per = f"{detail.tokens} tokens and {detail.contexts} contexts of each expert, {detail.sample} tokens of each text"
    return [f"to stay small, this page shows {per}, and {shown_layers} layers' experts; --json has all"]


def _page(report: dict[str, Any], notes: Sequence[str], detail: Detail) -> Page:
    rows, findings = report["layers"], report["findings"]
    sizes = sorted({f"{row['experts']}, {row['top_k']}" for row in rows})
    labels = [(f"{tokens:,}", f"of {name}") for name, tokens in report["labels"].items()]
    texts = "text" if len(report["texts"]) == 1 else "texts"
    return Page(
        about=f"{report['model']}, {report['folder']}",
        verdict=findings[0]["name"] if findings else "no verdict",
        severity=findings[0]["severity"] if findings else None,
        findings=[
            {**one, "where": f"{len(one['layers'])} of {len(rows)} layers; the worst is {one['layers'][0]}"}
            for one in grouped(findings)
        ],
        facts=[
            *(fact(len(rows), "layer"), ("; ".join(sizes), "experts, top k")),
            (f"{report['tokens']:,}", f"tokens of {len(report['texts'])} {texts}"),
            *(labels if len(labels) > 1 else []),
        ],
        notes=[sentence(note) for note in notes],
        sections=[section for section in _sections(report, detail) if section.blocks],
        footer=", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    )


def _sections(report: dict[str, Any], detail: Detail) -> Iterator[Section]:
    rows, several = report["layers"], len(report["labels"]) > 1
    short = short_names([row["layer"] for row in rows])
    order = [finding["layer"] for finding in report["findings"]]
    loads = [[share * len(row["load"]) for share in row["load"]] for row in rows]
    title = "load of each expert, over an even share"
    yield Section("Load of each expert", [Heat(title, [*short.values()], [("", loads)])])
    yield Section("Layers", [layers_table(report)], SURE + (DIFFER if several else ""))
    yield Section("Labels against each other", [*_labels(report, short)], DIVERGENCE)
    opened = short[order[0] if order else rows[0]["layer"]]
    yield Section("Tokens by their first expert", [*_sample(report, detail, short, opened)])
    ranked = {name: at for at, name in enumerate(order)}
    kept = {row["layer"] for row in sorted(rows, key=lambda row: ranked.get(row["layer"], len(rows)))[: detail.layers]}
    of_layers = [
        Section(row["layer"], [*_layer(report, row, detail)], folded=len(kept) > 1)
        for row in rows
        if row["layer"] in kept
    ]
    yield Section("What each expert gets", of_layers, EXPERTS.format(least=LEAST))


def _labels(report: dict[str, Any], short: Mapping[str, str]) -> Iterator[Block]:
    """How far labels differ, layer by layer, and which expert each prefers."""
    names, rows = list(report["labels"]), report["layers"]
    if len(names) < 2:
        return
    every = sorted(
        combinations(range(len(names)), 2), key=lambda pair: -max(row["divergence"][pair[0]][pair[1]] for row in rows)
    )
    pairs = every[:PAIRS]
    lines = [[short[row["layer"]], *(shown("", float(row["divergence"][a][b])) for a, b in pairs)] for row in rows]
    chances = [max(float(row["by_chance"][a][b]) for row in rows) for a, b in pairs]
    lines.append(["by chance, at least", *(shown("", chance) for chance in chances)])
    yield Table(["layer", *(f"{names[a]} / {names[b]}" for a, b in pairs)], lines)
    if len(every) > len(pairs):
        yield Note(f"{len(every) - len(pairs)} more pairs differ less.")
    for line in label_lines(report):
        yield Note(sentence(line))


def _sample(report: dict[str, Any], detail: Detail, short: Mapping[str, str], opened: str) -> Iterator[Coloured]:
    """The first tokens of each label, with as many of their choices as a page has room for."""
    layers, sample = [*short.values()], report["sample"]
    tokens = sum(min(len(one["tokens"]), detail.sample) for one in sample)
    most = max(1, CHOICES // max(11 * tokens * len(layers), 1))
    for one in sample:
        chosen = {}
        for name, experts, gates in zip(layers, one["experts"], one["gates"], strict=True):
            both = zip(experts[: detail.sample], gates[: detail.sample], strict=True)
            chosen[name] = [list(zip(expert[:most], gate[:most], strict=True)) for expert, gate in both]
        yield Coloured(one["label"], one["tokens"][: detail.sample], chosen, opened)


def _layer(report: dict[str, Any], row: dict[str, Any], detail: Detail) -> Iterator[Block]:
    """The loads of a layer by label, and the tokens and contexts of each expert."""
    if len(row["labels"]) > 1:
        loads = [[share * row["experts"] for share in one["load"]] for one in row["labels"].values()]
        yield Heat("load by label, over an even share", [*row["labels"]], [("", loads)], row="label")
    yield Cards([_card(row, expert, detail) for expert in range(row["experts"])])


def _card(row: dict[str, Any], expert: int, detail: Detail) -> Card:
    """An expert: its share, its most characteristic tokens, and where it was surest."""
    one = row["of_experts"][expert]
    tokens = [
        (visible(found["token"], "\u00b7"), f"lift {found['lift']:.3g}, {found['count']} of {found['of']}")
        for found in one["tokens"][: detail.tokens]
    ]
    contexts = [
        (
            *(found["before"], visible(found["token"], "\u00b7"), found["after"]),
            f"{found['label']}, probability {found['probability']:.2f}",
        )
        for found in one["contexts"][: detail.contexts]
    ]
    lines = [f"{percent(row['load'][expert])} of the load"]
    return Card(f"expert {expert}", expert, lines, tokens=tokens, contexts=contexts)
