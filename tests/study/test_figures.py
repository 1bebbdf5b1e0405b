"""The figures of a study show what is there: one scale, groups, published points, lines, the data of a quick form."""

import attrs
import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_engine import UsageError
from moe_engine.pages.blocks import Table
from moe_engine.pages.page import html_of
from moe_engine.study import figures
from moe_engine.study.page import markdown_of, study_page
from moe_engine.study.reading import read_study, shipped
from moe_engine.study.spec import Choice, FigureSpec, Published, Study, StudyPart

HOSTILE = "</script><script>alert(1)\x1b[31m"


def row(x, y, mean=1.0, part="main"):
    number = {"mean": mean, "half": 0.1, "values": [mean - 0.1, mean + 0.1]}
    place = {"part": part, "variant": f"{x}, {y}", "at": {"x": x, "y": y}}
    return {**place, "seeds": [0, 1], "status": "finished", "reason": None, "verdicts": {}, "numbers": {"cv": number}}


def results(rows, published=()):
    words = {"title": "T", "question": "Q?", "source": "", "notes": [], "criteria": [], "versions": {}}
    part = {"name": "main", "title": "Main", "columns": ["cv", "loss"]}
    return {**words, "parts": [part], "published": [attrs.asdict(one) for one in published], "rows": rows}


def study(*specs):
    axes = {"x": {"1": Choice(), "2": Choice()}, "y": {str(at): Choice() for at in range(8)}}
    return Study("s", "T", "Q?", "", (StudyPart("main", "Main", {"x": (), "y": ()}, ("cv",)),), axes, figure=specs)


def spec(kind, **more):
    return FigureSpec("one", "A title", more.pop("where", {"part": ("main",)}), kind, ("cv",), **more)


@pytest.fixture
def drawn(monkeypatch):
    """drawn(spec, rows, published, records): the figure, before it becomes a file."""
    kept = []
    monkeypatch.setattr(figures, "figure_bytes", lambda figure, kind: kept.append(figure) or b"")

    def draw(one, rows, published=(), records=()) -> Figure:
        figures.figures_of(study(one), results(rows, published), records)
        figure = kept.pop()
        figure.draw_without_rendering()
        return figure

    return draw


def ticks(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_many_rows_are_grouped_by_their_first_choices(drawn):
    rows = [row(x, str(y)) for x in "12" for y in range(8)]
    assert ticks(drawn(spec("numbers"), rows).axes[0]) == ["1", *map(str, range(8)), "2", *map(str, range(8))]
    bold = [one.get_fontweight() for one in drawn(spec("numbers"), rows).axes[0].get_yticklabels()]
    assert [at for at, weight in enumerate(bold) if weight == "bold"] == [0, 9]
    assert ticks(drawn(spec("numbers"), rows[4:12]).axes[0])[:2] == ["1, 4", "1, 5"]


def test_published_rows_stand_above_the_measured_ones(drawn):
    published = [Published("main", "theirs", {"cv": 3.0}), Published("other", "not here", {"cv": 3.0})]
    figure = drawn(spec("numbers"), [row("1", "0"), row("2", "0")], published)
    assert ticks(figure.axes[0]) == ["published", "theirs", "measured", "1", "2"]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [tuple(line.get_xdata()) for line in points] == [(3.0,)]


def test_published_points_and_lines_are_drawn_over_an_axis(drawn):
    published = [Published("main", "theirs", {"cv": 3.0}, at={"x": "2"}), Published("main", "nowhere", {"cv": 4.0})]
    one = spec("against", x="x", where={"part": ("main",), "y": ("0",)}, lines={"y": ("1",)})
    figure = drawn(one, [row("1", "0"), row("2", "0"), row("1", "1", mean=2.0)], published)
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "D"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in points] == [([1], [3.0])]
    assert [2.0, 2.0] in [list(line.get_ydata()) for line in axes.lines]
    assert axes.get_xlabel() == "x"
    assert {"published", "x: 1, y: 1"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def record(name, load, table):
    layer = {"load": load, "class_expert": table}
    summary = {"layers": [{"name": "moe"}]}
    records = [{"split": split, "step": 1, "layers": {"moe": layer}} for split in ("train", "eval")]
    return {"variant": f"main: {name}", "status": "finished", "summary": summary, "records": records, "config": {}}


@pytest.mark.parametrize("kind", ["usage", "classes", "over_time"])
def test_panels_share_a_scale_that_is_named(kind, drawn):
    rows = [row("1", "0"), row("2", "0")]
    records = [
        record("1, 0", [0.3, 0.3, 0.2, 0.1, 0.1], [[3, 3, 2, 1, 1]]),
        record("2, 0", [0.9, 0.1, 0.0, 0.0, 0.0], [[9, 1, 0, 0, 0]]),
    ]
    figure = drawn(spec(kind), rows, records=records)
    first, second, *bar = figure.axes
    if kind == "usage":
        assert first.get_ylim() == second.get_ylim() and first.get_ylim()[1] >= 90
        return
    images = [*(first.images or first.collections), *(second.images or second.collections)]
    scales = {image.get_clim() for image in images if image.get_array() is not None and np.ndim(image.get_array()) == 2}
    assert scales == {(0, 0.9) if kind == "classes" else (0, 4.0)}
    assert bar[0].get_ylabel()


def test_a_title_is_not_wider_than_its_figure(drawn):
    one = attrs.evolve(spec("numbers"), title="a long title that says very much " * 6)
    figure = drawn(one, [row("1", "0"), row("2", "0")])
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_columns_without_numbers_are_left_out():
    page = markdown_of(results([row("1", "0")]))
    assert "|  | cv |" in page and "loss" not in page
    assert Table(("a", "b"), [["x", "-"], ["y", "-"]]).filled.columns == ["a"]
    assert Table(("a", "b"), [["x", "-"], ["y", "0"]]).filled.columns == ["a", "b"]
    assert Table(("a", "b"), []).filled.columns == ["a", "b"]


def test_the_words_of_a_study_can_do_no_harm():
    rows = [{**row(HOSTILE, "0"), "variant": HOSTILE, "reason": HOSTILE}]
    made = {**results(rows, [Published("main", HOSTILE, {"cv": 1.0})]), "title": HOSTILE, "notes": [HOSTILE]}
    text = html_of(study_page(made, {f"{HOSTILE}.png": b"\x89PNG"}))
    assert "alert(1)" in text
    assert "<script" not in text and "\x1b" not in text


@pytest.mark.parametrize("name", shipped())
def test_a_quick_form_says_what_it_trains_on(name):
    """And names no data set that it leaves out."""
    quick = read_study(name).shortened()
    assert "on generated data" in quick.title or "on the bundled" in quick.title
    titles = [quick.title, *(part.title for part in quick.part), *(one.title for one in quick.figure)]
    drawn = [one.title for one in quick.figure if {*one.where.get("part", ())} <= {part.name for part in quick.part}]
    for title in [*titles[: 1 + len(quick.part)], *drawn]:
        assert not any(word in title for word in ("MNIST", "CIFAR", "Shakespeare", "100K")), title


def test_a_title_of_a_part_or_figure_that_is_absent_is_refused(tmp_path):
    from importlib import resources

    text = resources.files("moe_engine.studies").joinpath("hierarchy.toml").read_text()
    for line, code in (
        ("[quick.titles]\nabsent = 'x'\n", "unknown-choice"),
        ("[quick.figures]\nno = 'x'\n", "unknown-figure"),
    ):
        (tmp_path / "mine.toml").write_text(text.replace("[quick.run]", f"{line}[quick.run]"))
        with pytest.raises(UsageError) as caught:
            read_study(str(tmp_path / "mine.toml"))
        assert caught.value.code == code
