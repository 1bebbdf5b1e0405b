"""The column layouts of routing counts: one column per expert, or one row per expert. Nothing here imports torch.

Suffix: R rows.
"""

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, listed

# Names of columns as `plain` spells them; of two columns with one role, the name that comes first here wins.
ROLES = {
    "layer": (
        *("layer", "layer_id", "layer_index", "layer_idx", "layer_number", "layer_num", "layer_no", "layer_name"),
        *("moe_layer", "layers", "block", "block_id", "block_index", "block_idx"),
    ),
    "split": ("split", "data_split", "dataset_split", "subset", "partition", "phase"),
    "expert": (
        *("expert", "expert_id", "expert_index", "expert_idx", "expert_number", "expert_num", "expert_no"),
        *("expert_name", "variable"),  # pandas' melt
    ),
    "tokens": ("tokens", "num_tokens", "n_tokens", "ntokens", "total_tokens"),
}
COUNTS = (
    *("count", "counts", "expert_count", "expert_counts", "token_count", "token_counts", "assignments", "assignment"),
    *("num_assignments", "n_assignments", "assignment_count", "routed_tokens", "tokens_routed", "tokens_per_expert"),
    *("num_tokens_per_expert", "selections", "selected", "hits", "usage", "expert_usage", "n", "freq", "frequency"),
    *("load", "loads", "expert_load", "expert_loads", "share", "shares", "fraction", "fractions", "frac"),
    *("load_fraction", "proportion", "percentage", "percent", "pct", "value"),
)
TOP_K = ("choices_per_token", "top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "experts_per_token")
TIMES = (  # summed over instead of being labels, and what orders the rows
    *("epoch", "epoch_id", "step", "global_step", "train_step", "training_step", "step_id", "iteration", "iter"),
    *("batch", "batch_id", "batch_index", "batch_idx", "timestamp", "time", "wall_time", "walltime", "runtime"),
    *("date", "datetime", "created_at", "relative_time_process", "relative_time_wall"),
)
SAMPLES = ("sample", "sample_id", "sample_index", "sample_idx", "example", "example_id", "sequence", "sequence_id")
TOKEN = ("token", "token_id", "token_index", "token_idx", "token_pos", "token_position", "tok", "tok_id", "position")
ROW = ("", "index", "idx", "row", "row_id", "row_index", "row_number", "level_0")
TOTAL_ROWS = {"total", "totals", "grand_total", "subtotal", "subtotals"}
TOTALS = TOTAL_ROWS | {"sum", "all", "row_total", "total_count", "total_counts", "total_assignments"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev"}

COUNT_WORDS = {*("count", "counts", "num", "n", "tokens", "assignments", "hits", "routed", "selected", "usage")}
SHARE_WORDS = {*("share", "shares", "frac", "fraction", "percent", "pct", "ratio", "proportion", "load", "freq")}
ID_WORDS = {*("id", "ids", "idx", "index", "indices", "selected", "chosen", "topk", "top1", "top2", "choice")}
SCORE_WORDS = {
    *("prob", "probs", "probability", "probabilities", "weight", "weights", "score", "scores", "logit", "logits"),
    *("softmax", "sigmoid", "gates", "gating", "importance"),
}
# words that make a column of an expert something else than its count; W&B adds __MIN and __MAX
OTHER_WORDS = (ID_WORDS | SCORE_WORDS | {"min", "max", "mean", "avg", "std", "var", "median", "bias", "grad"}) - {
    *("selected", "chosen")  # these may be counts
} | {*("norm", "loss", "capacity", "dropped", "overflow", "entropy", "latency", "flops", "params", "accuracy")}

LAYER = re.compile(r"(?:^|_)(?:layers?|blocks?|l)_?([0-9]{1,6})(?=_|e|$)")
_EXPERT = re.compile(r"(?:(.*)_)?(?:experts?|exp|e)_?([0-9]{1,6})(?:_(.*))?")
_INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_MARKS = re.compile(r"[^0-9a-zA-Z]+")

Codes = NDArray[Any]


def plain(name: str) -> str:
    """A name in the spelling of the tables above: layerId, Layer-ID and "layer id" are layer_id."""
    return _MARKS.sub("_", _INNER_CAPITAL.sub("_", name)).strip("_").lower()


def expert_number(name: str) -> int | None:
    """7 of 7, e7, expert_7 and "Expert 7"; None of any other name."""
    match = re.fullmatch(r"(?:(?:experts?|exp|e)_?)?([0-9]{1,6})", plain(name))
    return int(match[1]) if match else None


def names_expert(name: str) -> bool:
    """Whether a name is that of a column of one expert, such as e0 and moe/layer_0/expert_3."""
    return _parts(plain(name)) is not None


def looks_like(names: Iterable[str]) -> str:
    """The end of a sentence: what a file without counts seems to hold, by the names in it."""
    words = [{*plain(name).split("_")} for name in names]
    about_experts = {"expert", "experts", "router", "routing", "gate", "topk", "top1", "selected", "chosen", "layer"}
    if any(found & SCORE_WORDS for found in words):
        return "; it looks like scores or probabilities of a router, so count the experts that each token chose"
    if any(found & {*ID_WORDS, "expert", "experts"} and found & about_experts - {"layer"} for found in words):
        return "; it looks like ids of chosen experts, so count how often each of them occurs in a layer"
    return ""


def no_counts(file: str, names: Sequence[str]) -> UsageError:
    """The error for a file in which no name stands for counts."""
    return UsageError(
        f"{file} has no counts: it needs columns expert0, expert1, ... or e0, e1, ... or both expert and count, and "
        f"has {listed(names)[:120] or 'none'}{looks_like(names)}",
        code="no-count-columns",
    )


@attrs.frozen
class Block:
    """The columns of the experts of one layer and split, which are None unless the columns' names hold them."""

    layer: str | None
    split: str | None
    names: list[str]


@attrs.frozen
class Columns:
    """The columns of a file, by their lower-case names.

    at: their numbers. roles: the columns of layer, split, expert, count and tokens. blocks: of the wide form. top_k:
    that give the number of choices. times: that order rows. token: that numbers tokens. summed: over which rows are
    added. candidates: labels or values, as `pick_labels` finds out. numbering: those candidates that may number rows.
    """

    at: dict[str, int]
    roles: dict[str, str]
    blocks: list[Block]
    top_k: list[str]
    times: list[str]
    token: str | None
    summed: list[str]
    candidates: list[str]
    numbering: set[str]

    @classmethod
    def of(cls, file: str, header: Sequence[str], over: Container[str], split: str) -> "Columns":
        """The columns by their names in the header. over: to be summed over. split: of the split. Raises UsageError."""
        names = [name.strip().lower() or f"column {number}" for number, name in enumerate(header, 1)]
        if names and all(map(_is_number, names)):
            message = f"{file}: its first line holds numbers, not names; give it a header such as layer,expert,count"
            raise UsageError(message, code="no-header")
        if len({*names}) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            raise UsageError(f"{file}: two columns are called '{twice}'; rename one", code="duplicate-column")
        spelled = dict(zip(names, map(plain, header), strict=True))
        by_plain = {spelling: name for name, spelling in reversed(spelled.items())}
        chosen = {name for name in names if name in over or spelled[name] in over}

        def first(aliases: Iterable[str], taken: Container[str] = ()) -> str | None:
            found = (by_plain.get(alias) for alias in aliases)
            return next((name for name in found if name is not None and name not in taken), None)

        roles = {role: name for role, aliases in ROLES.items() if (name := first(aliases, chosen)) is not None}
        if split != "split":
            roles.pop("split", None)
        if (named := next((name for name in names if split in (name, spelled[name])), None)) is not None:
            roles = {**{role: name for role, name in roles.items() if name != named}, "split": named}
        if "expert" in roles:
            count = first((*COUNTS, *ROLES["tokens"]), {*chosen, *roles.values()} - {roles.get("tokens")})
            roles |= {"count": count} if count is not None else {}
            if count == roles.get("tokens"):  # of each expert, as no other column gives a count
                roles.pop("tokens", None)
        blocks, others = _blocks(file, spelled)
        roles = _one_form(file, names, roles, blocks)
        taken = {*roles.values(), *others, *(name for block in blocks for name in block.names)}
        return cls(
            dict(zip(names, range(len(names)), strict=True)),
            roles,
            blocks,
            *_by_purpose(spelled, taken, chosen),
        )

    @property
    def keys(self) -> list[str]:
        """The columns that tell series apart in any case."""
        return [*(self.roles[role] for role in ("layer", "split") if role in self.roles), *self.top_k]


def _one_form(file: str, names: list[str], roles: dict[str, str], blocks: list[Block]) -> dict[str, str]:
    """The roles in the form that the file has. Raises UsageError if that is neither form, or both."""
    long = {"expert", "count"} <= roles.keys()
    if blocks and long:
        message = f"{file} has a column per expert, and also the columns {roles['expert']} and {roles['count']}"
        raise UsageError(f"{message}; keep one form", code="two-forms")
    if not blocks and not long:
        raise no_counts(file, names)
    return roles if long else {role: name for role, name in roles.items() if role not in ("expert", "count")}


def _by_purpose(
    spelled: Mapping[str, str], taken: Container[str], chosen: set[str]
) -> tuple[list[str], list[str], str | None, list[str], list[str], set[str]]:
    """The other columns by what they are for, in the order of the fields of `Columns`."""
    free = {name: spelling for name, spelling in spelled.items() if name not in taken}
    top_k = [name for name, spelling in free.items() if spelling in TOP_K and name not in chosen]
    times = sorted(
        (name for name, spelling in free.items() if spelling in TIMES), key=lambda name: TIMES.index(free[name])
    )
    token = next((name for name, spelling in free.items() if spelling in TOKEN), None)
    by_name = {*TIMES, *SAMPLES, *TOKEN}
    summed = [name for name, spelling in free.items() if name in chosen or spelling in by_name]
    done = {*top_k, *summed, *(name for name, spelling in free.items() if spelling in TOTALS)}
    candidates = [name for name in free if name not in done]
    numbering = {name for name in candidates if free[name] in ROW or free[name].startswith("unnamed_")}
    return top_k, times, token, summed, candidates, numbering


# -- the wide form ---------------------------------------------------------------------------------


def _blocks(file: str, spelled: Mapping[str, str]) -> tuple[list[Block], list[str]]:
    """The columns of counts by layer and split, and those that hold something else of an expert."""
    kinds: dict[tuple[str, ...], dict[tuple[str | None, str | None], dict[int, str]]] = {}
    found = [(name, parts) for name, spelling in spelled.items() if (parts := _parts(spelling))]
    if not found:
        found = _digits(spelled)
    for name, (words, place, number) in found:
        numbers = kinds.setdefault(words, {}).setdefault(place, {})
        if number in numbers:
            message = f"{file}: '{numbers[number]}' and '{name}' are both of expert {number}; keep one"
            raise UsageError(message, code="duplicate-column")
        numbers[number] = name
    if not kinds or (best := min(map(_rank, kinds))) == _rank(("id",)):
        return [], [name for name, _ in found]
    counts, *more = [words for words in kinds if _rank(words) == best]
    if more:
        two = [next(iter(next(iter(kinds[words].values())).values())) for words in (counts, more[0])]
        message = f"{file} counts each expert twice, as in '{two[0]}' and '{two[1]}'; keep one of the two"
        raise UsageError(message, code="two-forms")
    blocks = [_block(file, *place, numbers) for place, numbers in kinds[counts].items()]
    kept = {name for block in blocks for name in block.names}
    return blocks, [name for name, _ in found if name not in kept]


def _block(file: str, layer: str | None, split: str | None, numbers: dict[int, str]) -> Block:
    if (gap := next((number for number in range(len(numbers)) if number not in numbers), None)) is not None:
        of_layer = "" if layer is None else f" of layer {layer}"
        message = f"{file}: there is no column for expert {gap}{of_layer}; number them from 0 on, without a gap"
        raise UsageError(message, code="missing-expert-column")
    return Block(layer, split, [numbers[number] for number in sorted(numbers)])


Parts = tuple[tuple[str, ...], tuple[str | None, str | None], int]


def _parts(spelling: str) -> Parts | None:
    """The other words, the layer and split, and the number of a column like "train_layer_0_expert_3_count"."""
    if "e" not in spelling:
        return None
    layer = LAYER.search(spelling)
    rest = f"{spelling[: layer.start()]}_{spelling[layer.end() :]}".strip("_") if layer else spelling
    if not (match := _EXPERT.fullmatch(rest)):
        return None
    words = [word for part in (match[1], match[3]) if part for word in part.split("_") if not word.isdigit()]
    split = next((word for word in words if word in SPLITS), None)
    return tuple(word for word in words if word != split), (layer and layer[1], split), int(match[2])


def _digits(spelled: Mapping[str, str]) -> list[tuple[str, Parts]]:
    """Columns 0, 1, ... next to a column that has another name: what pandas calls those of a matrix."""
    numbered = {int(name): name for name in spelled if name.isascii() and name.isdigit() and len(name) <= 6}
    if len(numbered) < 2 or len(numbered) == len(spelled) or {*numbered} != {*range(len(numbered))}:
        return []
    return [(name, ((), (None, None), number)) for number, name in numbered.items()]


def _rank(words: tuple[str, ...]) -> int:
    """How likely a column of an expert, with these other words in its name, is its count; the last rank is not."""
    found = {*words}
    if found & OTHER_WORDS:
        return 4
    if found & COUNT_WORDS or not words:
        return 0 if words else 1
    return 3 if found & SHARE_WORDS else 2


# -- labels ----------------------------------------------------------------------------------------


class Rows:
    """The cells of some columns over all rows of a file, as codes: equal cells have equal codes."""

    def __init__(self) -> None:
        self.size = 0
        self._seen: dict[str, dict[Any, int]] = {}
        self._parts: dict[str, list[Codes]] = {}

    def add(self, names: Iterable[str], cells: Mapping[str, Sequence[Any]], size: int) -> None:
        """Add rows."""
        self.size += size
        for name in names:
            seen, column = self._seen.setdefault(name, {}), cells[name]
            for cell in dict.fromkeys(column):
                seen.setdefault(cell, len(seen))
            self._parts.setdefault(name, []).append(np.fromiter(map(seen.__getitem__, column), np.int64, len(column)))

    def codes(self, names: Iterable[str]) -> Codes:
        """[R]: a code of the cells of some columns together."""
        code_R = np.zeros(self.size, np.int64)
        for number, name in enumerate(names):
            column_R = np.concatenate(self._parts[name])
            code_R = _joined(code_R, column_R) if number else column_R
        return code_R

    def texts(self, name: str) -> list[str]:
        """The different cells of a column, without empty ones."""
        return [text for cell in self._seen[name] if cell is not None and (text := str(cell).strip())]


def pick_labels(columns: Columns, rows: Rows) -> list[str]:
    """The candidates that are labels: each value of a label has rows of its own for the experts of a layer.

    A column that differs between the experts of one layer, or from row to row, is a value, such as a share or a loss:
    it would tear a layer into series of a few counts each. Text is a label if the experts share it; a number only if
    rows that are otherwise alike differ in it, or if it is the same in a whole series.
    """
    expert_R = rows.codes([columns.roles["expert"]] if "expert" in columns.roles else [])
    series_R, time_R = rows.codes(columns.keys), rows.codes(columns.summed)
    code_of = {name: rows.codes([name]) for name in columns.candidates}
    kind_of = {name: _kind(rows.texts(name)) for name in columns.candidates}
    row_numbers = {name for name in columns.numbering if kind_of[name] != "text"}
    usual = [name for name in columns.candidates if kind_of[name] and name not in row_numbers]
    alike = not _apart(series_R, time_R, expert_R)  # whether rows are alike in all but the candidates
    labels = set()
    varying = [name for name in usual if _number(code_of[name]) > 1]
    for name in sorted(varying, key=lambda name: (kind_of[name] != "text", _number(code_of[name]))):
        code_R, kind = code_of[name], kind_of[name]
        repeats = kind == "whole" or 2 * _number(code_R) <= rows.size
        least = 0.5 if kind == "text" else 0.9  # sparse rows name few experts
        if (kind == "text" or (alike and repeats)) and _coverage(series_R, code_R, expert_R) > least:
            labels.add(name)
            series_R = _joined(series_R, code_R)
            alike = alike and not _apart(series_R, time_R, expert_R)
    for name in usual:
        several = _number(code_of[name])
        shared = 2 * several <= rows.size or (several == 1 and kind_of[name] == "whole")
        constant = several == 1 or (shared and _number(_joined(series_R, code_of[name])) == _number(series_R))
        if constant and (shared or kind_of[name] == "text"):
            labels.add(name)
    return [name for name in columns.candidates if name in labels]


def _apart(*codes: Codes) -> bool:
    """Whether no two rows are alike in all of these codes."""
    code_R, *more = codes
    for other_R in more:
        code_R = _joined(code_R, other_R)
    return _number(code_R) == len(code_R)


def _coverage(series_R: Codes, code_R: Codes, expert_R: Codes) -> float:
    """The part of a series' experts that is left in it if a column splits it further, on average."""
    if not expert_R.any():  # one row names all experts, or there is only one
        return 1.0
    split = _joined(series_R, code_R)
    before = _number(_joined(series_R, expert_R)) / _number(series_R)
    return _number(_joined(split, expert_R)) / _number(split) / before


def _kind(texts: Sequence[str]) -> str:
    """What a column's cells are: "text", "whole" or "fraction", or "" if there are none."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return "text"
    if not values:
        return ""
    return "whole" if all(value.is_integer() for value in values) else "fraction"


def _joined(first_R: Codes, second_R: Codes) -> Codes:
    """[R]: a code of two codes together."""
    if not len(first_R):
        return first_R
    pair_R = first_R * (int(second_R.max()) + 1) + second_R
    return np.unique(pair_R, return_inverse=True)[1].reshape(-1)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(code_R: Codes) -> int:
    """How many different codes there are."""
    return int(code_R.max()) + 1 if len(code_R) else 0
