"""The column layouts of routing counts: one column per expert, or one row per expert. Nothing here imports torch."""

import re
from collections.abc import Sequence

import attrs

from ..errors import UsageError, listed

EXPERT = re.compile(r"(?:expert|e)[ _]?([0-9]{1,6})")  # a column of the wide form


@attrs.frozen
class Columns:
    """The columns of a file. at: number by name. keys: those that tell series apart. experts: of the wide form."""

    at: dict[str, int]
    keys: list[str]
    experts: list[str]

    @classmethod
    def of(cls, file: str, names: Sequence[str], over: set[str]) -> "Columns":
        """The columns by their names in the header. Raises UsageError."""
        lower = [name.lower() for name in names]
        if twice := [name for name in lower if lower.count(name) > 1]:
            raise UsageError(f"{file}: two columns are called '{twice[0]}'; rename one", code="duplicate-column")
        found = {int(match[1]): name for name in lower if (match := EXPERT.fullmatch(name))}
        if found and {"expert", "count"} <= set(lower):
            message = f"{file} has a column per expert, and also the columns expert and count; keep one form"
            raise UsageError(message, code="two-forms")
        if not found and not {"expert", "count"} <= set(lower):
            raise UsageError(
                f"{file} has no counts: it needs columns expert0, expert1, ... or e0, e1, ... or both expert and "
                f"count, and has {listed(lower)[:120]}",
                code="no-count-columns",
            )
        if gaps := [number for number in range(len(found)) if number not in found]:
            message = f"{file}: there is no column for expert {gaps[0]}; number them from 0 on, without a gap"
            raise UsageError(message, code="missing-expert-column")
        taken = {*over, "tokens", *(found.values() or ("expert", "count"))}
        at = {name: number for number, name in enumerate(lower)}
        return cls(at, [name for name in lower if name not in taken], [found[number] for number in sorted(found)])
