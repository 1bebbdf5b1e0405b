"""Check the structure of core/: rooms in order, no import cycles, classes and functions of a readable size.

python tools/structure.py prints every finding and exits 1 if there is one. `make lint` runs it; a test does, too.
python tools/structure.py --map writes the map of core/ into CONTRIBUTING.md, from the modules' docstrings.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core"

# A room imports only itself and rooms before it. The first five are modules that every room may use.
ROOMS = (
    *("errors", "seeds", "files", "processes", "optimizer_state"),
    *("contract", "registry", "layer", "growth", "engine"),  # the engine proper
    *("parallel", "pages"),
    *("tasks", "run", "analysis", "plan", "pretrained", "study", "integrations", "testing", "cli", "__main__"),
)
ENGINE_PROPER = ROOMS[: ROOMS.index("engine") + 1]
MOST_MODULES = 6  # modules directly in core/
LONGEST_CLASS, LONGEST_BODY = 250, 45  # lines; a body is without signature, decorators and docstring


def modules() -> dict[str, Path]:
    """Every module of core/ by its dotted name."""
    found = {}
    for path in sorted(CORE.rglob("*.py")):
        name = ".".join(path.relative_to(CORE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module of core/, line) of every import in a module, also of those in functions or for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "moe_engine"]
            yield from ((target.partition(".")[2], node.lineno) for target in targets)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == "moe_engine":
                base = node.module.partition(".")[2]
            else:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield (inner if inner in known else base), node.lineno


def arrows() -> dict[str, dict[str, int]]:
    """module -> {imported module: line}; the public names, which are imported on first use, are left out."""
    known = modules()
    return {
        name: {target: line for target, line in imports(name, path, known) if target != name}
        for name, path in known.items()
        if name
    }


def upward(graph: dict[str, dict[str, int]]) -> list[str]:
    """Imports of a later room, and of rooms that have no place in the order."""
    found = []
    for name, targets in graph.items():
        for target, line in targets.items():
            here, there = name.split(".")[0], target.split(".")[0]
            if here not in ROOMS or (there not in ROOMS and there):
                found.append(f"{name}:{line}: '{here}' or '{there}' has no place in ROOMS")
            elif there and ROOMS.index(there) > ROOMS.index(here):
                found.append(f"{name}:{line}: '{here}' imports '{there}', which comes later")
    return found


def circles(graph: dict[str, dict[str, int]]) -> list[str]:
    """A circle of imports, if there is one."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return ["a circle of imports: " + " -> ".join(error.args[1])]
    return []


def loose() -> list[str]:
    """More modules in core/ itself than a reader takes in at once."""
    names = [path.name for path in CORE.glob("*.py") if path.name != "__init__.py"]
    return [f"core/ has {len(names)} modules, more than {MOST_MODULES}: {names}"] if len(names) > MOST_MODULES else []


def too_long() -> list[str]:
    """Classes and function bodies that no longer fit a screen."""
    found = []
    for folder in ("core", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.ClassDef) and (size := node.end_lineno - node.lineno + 1) > LONGEST_CLASS:
                    found.append(f"{where}: class {node.name} has {size} lines, more than {LONGEST_CLASS}")
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (size := body(node)) > LONGEST_BODY:
                    found.append(f"{where}: the body of {node.name} has {size} lines, more than {LONGEST_BODY}")
    return found


def body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without signature, decorators and docstring."""
    documented = ast.get_docstring(function) is not None
    statements = function.body[documented:]
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def core_map() -> str:
    """core/ as a tree: every room and module in order, each with the first line of its docstring."""
    known = modules()
    lines = ["core/" + " " * 21 + "the package moe_engine; it names no plugin"]
    for name in sorted((one for one in known if one), key=lambda one: (ROOMS.index(one.split(".")[0]), one)):
        indent = "  " * (1 + name.count("."))
        leaf = name.rpartition(".")[2] + ("/" if known[name].name == "__init__.py" else ".py")
        said = (ast.get_docstring(ast.parse(known[name].read_text("utf-8"))) or "").partition("\n")[0]
        lines.append(f"{indent + leaf:<25} {said.rstrip('.')}".rstrip())
    return "\n".join(lines)


def write_map() -> None:
    """Replace the map in CONTRIBUTING.md."""
    page = ROOT / "CONTRIBUTING.md"
    text = page.read_text("utf-8")
    start, end = text.index("core/ "), text.index("\nplugins/ ")
    page.write_text(text[:start] + core_map() + text[end:], "utf-8")


def main() -> int:
    graph = arrows()
    checks = {"upward imports": upward(graph), "circles": circles(graph), "loose modules": loose(), "size": too_long()}
    for title, findings in checks.items():
        print(f"{title}: {len(findings)}")
        for finding in findings:
            print(f"  {finding}")
    return int(any(checks.values()))


if __name__ == "__main__":
    if "--map" in sys.argv:
        write_map()
    else:
        sys.exit(main())
