"""The exceptions: UsageError (bad input), PluginError (a broken plugin) and RunError (a failed run)."""


class MoeEngineError(Exception):
    """What moe-engine raises on purpose.

    message: one sentence that says what is wrong, where, and what to do; the wording may change at any time. code:
    the stable name of this error, such as "unknown-plugin"; empty if a plugin gave none.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class UsageError(MoeEngineError):
    """Bad input. On the command line: exit 2."""


class PluginError(UsageError):
    """A chosen plugin that cannot be used: it does not load, or breaks the contract."""


class RunError(MoeEngineError):
    """Something failed after the run began: a non-finite loss, a plugin that raised. Exit 1."""


def listed(names: object) -> str:
    """Join names for a sentence: "a, b and c"."""
    words = [str(name) for name in names]  # type: ignore[attr-defined]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def nearest(name: str, known: object) -> str:
    """The end of an "unknown name" sentence: the closest names, or all that exist."""
    from difflib import get_close_matches

    names = sorted(str(name) for name in known)  # type: ignore[attr-defined]
    close = get_close_matches(name, names, n=2)
    if close:
        return "did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
    return f"choose from {listed(names)}" if names else "there is none"


def visible(text: str, space: str = " ") -> str:
    """Text that is safe to show anywhere: line breaks and tabs are arrows, whatever else does not print is escaped."""
    if text.isprintable() and space == " ":
        return text
    shown = {"\n": "\u21b5", "\t": "\u21e5", " ": space}
    return "".join(
        shown.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )
