"""A claim: a sentence that holds for every plugin with a certain hook, and its test."""

import unittest
from collections.abc import Callable
from typing import Any

import attrs

Test = Callable[[Any], str | None]  # called with a Bench; raises Broken, or may return a remark such as a refusal


class Broken(AssertionError):
    """A claim does not hold. The message names the plugin and the claim, what was observed, and what to do.

    claims: the names of the claims that failed.
    """

    def __init__(self, message: str, claims: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.claims = claims


class NotApplicable(unittest.SkipTest):
    """A claim does not apply to this plugin; the message says why. Test runners count it as skipped."""


@attrs.frozen
class Claim:
    """One property that every plugin with one of the given hooks must have.

    name: a stable id, the name of its function. says: the claim in one sentence. hooks: the hooks to which it
    applies. test: runs on a `Bench`. on_ranks: it needs several ranks.
    """

    name: str
    says: str
    hooks: tuple[str, ...]
    test: Test = attrs.field(repr=False)
    on_ranks: bool = False


CLAIMS: list[Claim] = []  # every claim, in the order in which they are tested


def claim(*hooks: str, on_ranks: bool = False) -> Callable[[Test], Test]:
    """Register a function as a claim about plugins that implement one of the hooks; its docstring is the claim."""

    def register(test: Test) -> Test:
        says = " ".join((test.__doc__ or "").split()).rstrip(".")
        CLAIMS.append(Claim(test.__name__, says, hooks, test, on_ranks))
        return test

    return register


def demand(holds: object, message: str) -> None:
    """Raise Broken with the message unless `holds` is true."""
    if not holds:
        raise Broken(message)
