"""Errors: each has a stable code, survives a trip to another process, and says nearest names."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from moe_engine import PluginError, RunError, UsageError
from moe_engine.errors import MoeEngineError, listed, nearest

ROOT = Path(__file__).parents[1]
ERRORS = {"UsageError", "PluginError", "RunError"}


def raised():
    """(file, line, call) of every error made in core/ and plugins/."""
    for folder in ("core", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    yield path.relative_to(ROOT), node.lineno, node


def test_every_error_has_a_code():
    """A literal in kebab-case, or one of two."""
    found = list(raised())
    assert len(found) > 150
    bare = []
    for path, line, call in found:
        codes = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
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


def test_names_in_a_sentence():
    assert listed(["a"]) == "a"
    assert listed("abc") == "a, b and c"
    assert nearest("tpok", ["topk", "relu"]) == "did you mean 'topk'?"
    assert nearest("x", ["topk", "relu"]) == "choose from relu and topk"
    assert nearest("x", []) == "there is none"
