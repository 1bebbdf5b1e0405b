"""What a claim is: a sentence about every plugin that implements some hook, and the test of it."""

import unittest
from collections.abc import Callable
from typing import Any

import attrs

Test = Callable[[Any], str | None]  # of a Bench: raises, or answers a remark, as that a mix is refused


class Broken(AssertionError):
    """A claim that does not hold. The message says of whom, what and what to do."""


class NotApplicable(unittest.SkipTest):
    """A claim that says nothing about this plugin. The message says why; pytest counts it as skipped."""


@attrs.frozen
class Claim:
    """One thing that is promised of every plugin with one of some hooks.

    name: of its function. says: the promise in one sentence. hooks: of whom.
    """

    name: str
    says: str
    hooks: tuple[str, ...]
    test: Test = attrs.field(repr=False)


CLAIMS: list[Claim] = []  # in the order in which they are tested


def claim(*hooks: str) -> Callable[[Test], Test]:
    """Make a function a claim about every plugin that implements one of these hooks; its docstring is the promise."""

    def register(test: Test) -> Test:
        says = " ".join((test.__doc__ or "").split()).rstrip(".")
        CLAIMS.append(Claim(test.__name__, says, hooks, test))
        return test

    return register


def demand(holds: object, why: str) -> None:
    """Raise Broken, which says why, unless it holds."""
    if not holds:
        raise Broken(why)
