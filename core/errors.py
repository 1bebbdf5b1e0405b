"""What may go wrong, as the two kinds of error that a caller tells apart."""


class UsageError(Exception):
    """Bad input. The message is one sentence: what, where, what to do. On the command line: exit 2."""


class PluginError(UsageError):
    """A chosen plugin that cannot be used: it does not load, or breaks the contract."""


class RunError(Exception):
    """Something failed after the run began: a non-finite loss, a plugin that raised. Exit 1."""


def listed(names: object) -> str:
    """Names for a sentence: "a, b and c"."""
    words = [str(name) for name in names]  # type: ignore[attr-defined]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def nearest(name: str, known: object) -> str:
    """The end of an "unknown name" sentence: a likely meaning, or all that exists."""
    from difflib import get_close_matches

    names = sorted(str(one) for one in known)  # type: ignore[attr-defined]
    close = get_close_matches(name, names, n=2)
    if close:
        return "did you mean " + " or ".join(f"'{one}'" for one in close) + "?"
    return f"there is {listed(names)}" if names else "there is none"
