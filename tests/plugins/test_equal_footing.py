"""Built-in plugins use what every plugin may use, name no other plugin, and document themselves alike."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_engine
import moe_engine.pages
import moe_engine.tasks
import moe_engine.testing
from moe_engine.registry.discovery import find, load

PLUGINS = Path(__file__).parents[2] / "plugins"
FILES = {str(path.relative_to(PLUGINS)): path for path in sorted(PLUGINS.rglob("*.py"))}
PUBLIC = {
    "moe_engine": set(moe_engine.__all__),
    "moe_engine.pages": set(moe_engine.pages.__all__),
    "moe_engine.tasks": set(moe_engine.tasks.__all__),
    "moe_engine.testing": {name for name in vars(moe_engine.testing) if not name.startswith("_")},
}
BUILT_IN = {name: found for name, (found, *_) in find().items() if found.distribution == "moe-engine"}


def private_imports(tree):
    """Imports of more than the public names of moe_engine, however they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "moe_engine")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"{'.' * node.level}{node.module or ''}"
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "moe_engine":
            public = PUBLIC.get(node.module, set())
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public)


def private_attributes(tree):
    """Attributes that start with an underscore, unless the class of `self` defines them in the same file."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (of_self and node.attr in defined):
                yield f"{ast.unparse(node)} in line {node.lineno}"


def names_in_code(tree, names):
    """Names of plugins in strings that are neither docstrings nor keys, each as a whole word."""
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    skipped |= {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield from names & set(re.findall(r"\w+", node.value))


@pytest.mark.parametrize("name", FILES)
def test_a_built_in_imports_public_names_only(name):
    """Those that the documentation promises to every plugin."""
    assert list(private_imports(ast.parse(FILES[name].read_text("utf-8")))) == []


@pytest.mark.parametrize("name", FILES)
def test_a_built_in_uses_no_private_attribute_of_another_object(name):
    assert list(private_attributes(ast.parse(FILES[name].read_text("utf-8")))) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import moe_engine.seeds",
        "from moe_engine.layer.dense import DenseMLP",
        "from moe_engine import seeds",
        "from moe_engine.tasks import datasets",
        "from .topk import TopK",
        "from .. import routers",
        "def lazy():\n    from moe_engine.run.figures import curves",
    ],
)
def test_every_other_import_is_found(statement):
    assert len(list(private_imports(ast.parse(statement)))) == 1


@pytest.mark.parametrize("statement", ["layer._sums", "self._parameters", "f(x)._y", "super()._reset()"])
def test_every_private_attribute_is_found(statement):
    assert len(list(private_attributes(ast.parse(statement)))) == 1


def test_neither_public_helpers_nor_a_run_load_what_they_may_not_need():
    """And moe_engine itself, without its names, loads no torch."""
    code = """
import sys
import moe_engine
assert "torch" not in sys.modules
import moe_engine.tasks
moe_engine.run_figures, moe_engine.expert_loads, moe_engine.DenseMLP
import moe_engine.run.training
unneeded = ("torchvision", "torchmetrics", "matplotlib", "torch.distributed.tensor")
print([name for name in unneeded if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(PUBLIC["moe_engine"] | PUBLIC["moe_engine.pages"] | PUBLIC["moe_engine.tasks"]))
def test_a_public_helper_is_documented(name):
    homes = (moe_engine, moe_engine.pages, moe_engine.tasks)
    home = next(one for one in homes if name in PUBLIC[one.__name__])
    assert not callable(getattr(home, name)) or getattr(home, name).__doc__


# -- what a built-in says about itself -----------------------------------------------------------------


def syntax(name):
    """The syntax tree of a built-in's file."""
    module = BUILT_IN[name].entry_point.module.removeprefix("moe_engine.plugins.").replace(".", "/")
    return ast.parse(FILES[f"{module}.py"].read_text("utf-8"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_names_no_other_plugin_in_its_code(name):
    """It asks by hook or effect instead, so a stranger's plugin counts as much; a docstring may compare formulas."""
    others = {other for other in BUILT_IN if "_" in other and other != name}  # the others are also plain words
    if BUILT_IN[name].kind == "family":  # its recipe names a router
        others = {other for other in others if BUILT_IN[other].kind not in ("router", "family")}
    assert set(names_in_code(syntax(name), others)) == set()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_docstring_begins_with_a_phrase_that_fits_a_list_and_names_a_source(name):
    """At most 60 characters, a formula or explanation after it, and a year, unless the source is this project."""
    first, blank, *rest = load(BUILT_IN[name]).__doc__.splitlines()
    assert len(first) <= 60 and first.endswith(".") and blank == "" and rest
    text = " ".join(" ".join(rest).split())
    if BUILT_IN[name].kind != "report":
        assert re.search(r"Sources?: (.*\b(19|20)\d\d\b|this project)", text), text


@pytest.mark.parametrize("name", BUILT_IN)
def test_traits_stand_right_after_the_docstring(name):
    cls_name = load(BUILT_IN[name]).__name__
    (cls,) = (node for node in syntax(name).body if isinstance(node, ast.ClassDef) and node.name == cls_name)
    assigned = [i for i, node in enumerate(cls.body) if isinstance(node, ast.Assign) and node.targets[0].id == "traits"]
    assert assigned in ([], [1])
