"""A one-line summary of each installed plugin, read from its source without importing it."""

import ast
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from ..registry.discovery import Found


def summary_of(found: Found) -> str:
    """The first line of a plugin's docstring, or its distribution's name where the source can't be found."""
    try:
        module = _parsed(found.entry_point.module)
    except Exception:  # a third party's finder, file or syntax may be broken, which must not break the list
        module = None
    if module is None:
        return found.distribution
    name = found.entry_point.attr.partition(".")[0]
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    text = next((ast.get_docstring(node) for node in classes), None) or ast.get_docstring(module)
    return text.splitlines()[0] if text else found.distribution


@cache
def _parsed(name: str) -> ast.Module | None:
    """The syntax tree of a module's source, or None if it has none."""
    spec = _spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text("utf-8"))


def _spec(name: str) -> ModuleSpec | None:
    """The location of a module, without importing its parent packages as importlib.util.find_spec would."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:depth]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if (spec := finder.find_spec(name, path, None)) is not None:
            return spec
    return None
