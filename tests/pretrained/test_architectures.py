"""docs/architectures.md says what tools/architectures.py measures."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("architectures", ROOT / "tools" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)
Row = architectures.Row

# adopted, only read, read with one of the two told, and not tried
MEASURED = ["GraniteMoeForCausalLM", "MiniMaxM2ForCausalLM", "NllbMoeForConditionalGeneration", "JambaForCausalLM"]


@pytest.fixture(scope="module")
def page():
    return architectures.PAGE.read_text("utf-8")


def rows_of(page):
    return [line for line in page.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", MEASURED)
def test_a_row_is_what_is_measured_now(name, page):
    if f"transformers {architectures.transformers.__version__} " not in page:
        pytest.skip("the page is of another version of transformers")
    row = architectures.tried(name)
    (measured,) = rows_of(architectures.page([row]))
    (told,) = [line for line in rows_of(page) if line.startswith(f"| `{row.kind}` |")]
    assert told == measured


def test_the_page_is_as_it_was_written(page):
    """Read back into rows and written again: no row is left out, and counts and text are the tool's own."""
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in rows_of(page)]
    rows = [Row(*row) if len(row) == 4 else Row(row[0], "", row[1], "", row[2]) for row in cells]
    version = re.search(r"architectures of transformers (\S+) with experts", page)[1]
    assert architectures.page(rows, version) == page
    assert len(rows) == len(architectures.ARCHITECTURES)
