"""What pages are made of: lines over common steps, heatmaps that fit a page, text that can do no harm."""

import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest

from moe_engine.pages import Card, Cards, Chart, Code, Heat, Mark, Page, Section, Table, Words, html_of, png
from moe_engine.pages.blocks import CELLS, grouped, spread

HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


def test_lines_are_drawn_over_the_steps_of_all():
    data = Chart("loss", {"training": ((1, 3), (0.5, 0.25)), "test": ((2, 3), (0.75, None))}).data
    assert data["steps"] == [1, 2, 3]
    assert {line["name"]: line["values"] for line in data["series"]} == {
        "training": [0.5, None, 0.25],
        "test": [None, 0.75, None],
    }


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm():
    lines = {"effect": ((1, 2, 3, 4), (0.0, 1e-9, float("nan"), float("inf")))}
    assert Chart("effect", lines, logarithmic=True).data["series"][0]["values"] == [None, 1e-9, None, None]
    assert Chart("effect", lines).data["series"][0]["values"] == [0.0, 1e-9, None, None]


@pytest.mark.parametrize(("count", "most", "kept"), [(5, 9, [0, 1, 2, 3, 4]), (5, 2, [0, 4]), (5, 1, [4]), (5, 0, [4])])
def test_the_last_of_what_is_spread_is_always_kept(count, most, kept):
    assert spread(range(count), most) == kept


def test_spread_is_even():
    kept = spread(range(100), 12)
    assert len(kept) == 12 and {b - a for a, b in pairwise(kept)} == {9}


def test_a_heatmap_keeps_as_many_moments_as_fit():
    frames = [(f"step {at}", [[1.0] * 256] * 48) for at in range(100)]
    data = Heat("load", [str(at) for at in range(48)], frames).data
    assert len(data["frames"]) == CELLS // (256 * 48) == 12
    assert (data["frames"][0]["name"], data["frames"][-1]["name"]) == ("step 0", "step 99")
    assert len(json.dumps(data)) < 1_000_000


def test_layers_of_unequal_size_share_a_heatmap():
    data = Heat("load", ["a", "b"], [("", [[1.23456, None], [float("nan"), 0.5, 2.0]])]).data
    assert data["columns"] == ["0", "1", "2"]
    assert data["frames"][0]["rows"] == [[1.23, None], [None, 0.5, 2.0]]


def test_a_finding_of_many_layers_is_told_once():
    findings = [
        {"name": "collapsed", "layer": "a"},
        {"name": "healthy", "layer": "b"},
        {"name": "collapsed", "layer": "c"},
    ]
    assert [(one["name"], one["layers"]) for one in grouped(findings)] == [
        ("collapsed", ["a", "c"]),
        ("healthy", ["b"]),
    ]


def page(*blocks):
    return html_of(
        Page(HOSTILE, HOSTILE, [Section(HOSTILE, blocks, HOSTILE)], facts=[(HOSTILE, HOSTILE)], notes=[HOSTILE])
    )


def test_no_text_becomes_markup_or_reaches_a_terminal():
    marks = [Mark(1, HOSTILE)]
    text = page(
        Table((HOSTILE,), [[HOSTILE]]),
        Chart(HOSTILE, {HOSTILE: ((1, 2), (1.0, 2.0))}, marks=marks),
        Heat(HOSTILE, [HOSTILE], [(HOSTILE, [[1.0]])], [HOSTILE]),
        Code(HOSTILE),
    )
    assert "alert(1)</script>" not in text
    assert "\x1b" not in text and "\\u001b" not in text


def test_a_page_asks_nothing_of_the_network():
    text = page(Chart("loss", {"training": ((1, 2), (1.0, 2.0))}))
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:)[^#\"']", text)


def test_a_page_without_charts_has_no_script():
    assert "<script" not in page(Table(("a",), [["1"]]))
    assert "leeoniya" not in page(Heat("load", ["a"], [("", [[1.0]])]))


def test_tokens_and_cards_are_escaped_and_line_breaks_are_seen():
    words = Words(HOSTILE, [HOSTILE, "a\n", png(np.zeros((2, 2), np.uint8))], {HOSTILE: [[(0, 1.0)], [], [(1, 0.5)]]})
    card = Card(HOSTILE, 3, [HOSTILE], [(b"\x89PNG", HOSTILE)], [(HOSTILE, HOSTILE)], [(HOSTILE,) * 4])
    text = page(words, Cards([card]))
    assert "alert(1)</script>" not in text and "\x1b" not in text and "\\u001b" not in text
    assert "<span>a\u21b5\n</span>" in text
    assert text.count("data:image/png;base64,") == 2


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (5, 7, 3)])
def test_a_png_has_the_numbers_of_its_picture(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    read = np.array(image.open(io.BytesIO(png(pixels))))
    assert (read == (pixels.transpose(1, 2, 0) if shape[0] == 3 else pixels)).all()


def test_numbers_that_are_not_a_picture_are_refused():
    for wrong in (np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="a picture is uint8"):
            png(wrong)
