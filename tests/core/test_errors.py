"""Errors: each has a stable code, survives a trip to another process, and suggests the nearest names."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from moe_engine import PluginError, RunError, UsageError
from moe_engine.errors import MoeEngineError, listed, nearest

ROOT = Path(__file__).parents[2]
ERRORS = {"UsageError", "PluginError", "RunError"}


def raised():
    """(file, line, call) of every error made in core/ and plugins/."""
    for folder in ("core", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    yield path.relative_to(ROOT), node.lineno, node


def test_every_error_has_a_code():
    """A literal in kebab-case, one of two, or an argument of a helper."""
    found = list(raised())
    assert len(found) > 150
    bare = []
    for path, line, call in found:
        codes = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        if any(isinstance(code, ast.Name) and code.id == "code" for code in codes):
            continue  # of a helper, whose callers give it
        words = [node.value for code in codes for node in ast.walk(code) if isinstance(node, ast.Constant)]
        words = [word for word in words if isinstance(word, str)]
        if not words or not all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+){1,4}", word) for word in words):
            bare.append(f"{path}:{line}: {words}")
    assert bare == []


@pytest.mark.parametrize("kind", [UsageError, PluginError, RunError])
def test_an_error_keeps_its_code_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("one sentence", code="some-code")))
    assert (type(error), str(error), error.code) == (kind, "one sentence", "some-code")
    assert isinstance(error, MoeEngineError)
    assert kind("a plugin's own").code == ""


@pytest.mark.parametrize(("names", "expected"), [("", ""), ("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_names_are_listed_as_in_a_sentence(names, expected):
    assert listed(list(names)) == expected


def test_the_nearest_names_are_suggested_or_all():
    assert nearest("tpok", ["topk", "hash"]) == "did you mean 'topk'?"
    assert nearest("zzz", ["topk", "hash"]) == "choose from hash and topk"
    assert nearest("zzz", []) == "there is none"


def test_bad_input_and_a_failed_run_are_told_apart():
    """A plugin that can't be used is bad input, too."""
    assert issubclass(PluginError, UsageError) and not issubclass(RunError, UsageError)
    assert (UsageError("why").code, UsageError("why", code="no-such-name").code) == ("", "no-such-name")
