"""The rooms of core/: their order, no circle, sizes, what the engine proper imports, and the map of them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torchvision", "matplotlib", "jinja2", "click", "rich", "joblib", "torchmetrics")


@pytest.fixture
def structure():
    """tools/structure.py, as a module."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def house(structure, tmp_path, monkeypatch):
    """house(files): findings of a core/ made of these files, by path."""

    def build(files):
        for path, text in files.items():
            file = tmp_path / "core" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
        monkeypatch.setattr(structure, "ROOT", tmp_path)
        monkeypatch.setattr(structure, "CORE", tmp_path / "core")
        graph = structure.arrows()
        return [*structure.upward(graph), *structure.circles(graph), *structure.loose(), *structure.too_long()]

    return build


def test_the_house_is_in_order(structure):
    assert structure.main() == 0


@pytest.mark.parametrize(
    "statement",
    [
        "from ..engine.engine import Engine",
        "from ..engine import engine",
        "import moe_engine.engine.engine",
        "from moe_engine.engine.engine import Engine",
        "def lazy():\n    from ..engine.engine import Engine",
        "if TYPE_CHECKING:\n    from ..engine.engine import Engine",
    ],
)
def test_an_import_of_a_later_room_is_found(house, statement):
    """However it is written."""
    (finding,) = house(
        {"layer/__init__.py": "", "layer/moe.py": statement, "engine/__init__.py": "", "engine/engine.py": ""}
    )
    assert re.fullmatch(r"layer\.moe:\d: 'layer' imports 'engine', which comes later", finding)


def test_a_room_without_a_place_is_found(house):
    (finding,) = house({"attic/__init__.py": "", "attic/box.py": "from ..errors import UsageError", "errors.py": ""})
    assert "'attic'" in finding


def test_a_circle_is_found(house):
    (finding,) = house({"layer/a.py": "from . import b", "layer/b.py": "from .a import A", "layer/__init__.py": ""})
    assert "layer.a" in finding and "layer.b" in finding


def test_loose_modules_and_long_code_are_found(house):
    long = "class A:\n" + "    x = 1\n" * 260 + "\ndef f():\n" + "    y = 1\n" * 46
    found = house(
        {f"{name}.py": "" for name in ("errors", "seeds", "files", "processes", "optimizer_state", "__main__")}
    )
    assert found == []
    found = house({"extra.py": "", "layer/long.py": long, "layer/__init__.py": ""})
    assert [word in finding for word, finding in zip(("7 modules", "class A", "body of f"), found, strict=True)] == [
        True
    ] * 3


def test_a_body_is_without_signature_decorators_and_docstring(house):
    text = '@deco(\n1,\n)\ndef f(\n    a,\n    b,\n):\n    """Doc\n\n    more.\n    """\n' + "    y = 1\n" * 45
    assert house({"layer/fits.py": text, "layer/__init__.py": ""}) == []


def test_the_engine_proper_imports_nothing_heavy(structure):
    """In a fresh process: all of its modules, and what `import moe_engine` promises."""
    proper = [name for name in structure.modules() if name.split(".")[0] in structure.ENGINE_PROPER]
    lines = [f"import moe_engine.{name}" for name in proper]
    code = "\n".join(["import sys", *lines, f"print([name for name in {HEAVY} if name in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_map_in_contributing_is_the_tree(structure):
    """Every module has a line, with what its docstring says: python tools/structure.py --map."""
    assert structure.core_map() in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_every_module_and_room_says_what_it_is(structure):
    for line in structure.core_map().splitlines():
        assert len(line.split(maxsplit=1)) == 2, line
