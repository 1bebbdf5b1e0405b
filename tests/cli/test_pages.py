"""`--html`: the page of a command has the numbers that it prints; what can't be written is refused."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_engine.cli import main
from sentences import check
from support import forge

BLOBS = ("--task", "blobs", "--set", "blobs.images=200", "--set", "blobs.test_images=50", "--epochs", "1")
QUIET = ("--no-plugin", "plots,html", "--quiet")
HOSTILE = "<script>alert(1)\x1b[2J"
COUNTS = "layer,split,e0,e1,e2,e3\n0,train,10,20,30,40\n0,test,25,25,25,25\n1,train,1,1,1,97\n1,test,4,3,2,1\n"
PLAN = "plan --layers 4 --dim 64 --hidden 128 --experts 16 --ranks 8 --memory 1 --rate 0.2 --bandwidth 1"
COMMANDS = {
    "compare": "compare one two",
    "replay": "replay one --routers topk,sigmoid_topk --biases none,loss_free --by-label",
    "routing-stats": "routing-stats counts.csv --per-expert",
    "routing-stats of a run": "routing-stats one",
    "plan": PLAN,
    "compare-plugins": f"compare-plugins {' '.join(BLOBS)} --routers topk,sigmoid_topk --seeds 2 --jobs 1 --quiet",
}


class Cells(HTMLParser):
    """The rows of all tables of a page, as text."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def rows_of(page):
    """Each row's cells, but for those that say nothing: a page leaves out columns of them."""
    cells = Cells()
    cells.feed(re.sub("<h2>What differs</h2>.*?(?=<h2>)", "", Path(page).read_text("utf-8"), flags=re.DOTALL))
    return [told(row) for row in cells.rows if row]


def told(cells):
    return [cell for cell in cells if cell not in ("", "-")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished runs, and a file of counts."""
    made = tmp_path_factory.mktemp("pages")
    for name, plugins in (("one", "switch_aux"), ("two", "sigmoid_topk")):
        words = ("run", *BLOBS, *QUIET, "--plugins", plugins, "--record-routing", "--out", str(made / name))
        assert main([*words]) == 0
    (made / "counts.csv").write_text(COUNTS)
    return made


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_the_page_has_the_cells_of_the_terminal(words, here, call):
    code, out, _ = call(*words.split(), "--html", "page.html")
    assert code == 0 and out.splitlines()[-1] == "page: page.html"
    lines = [told(re.split(r"\s{2,}", line.strip())) for line in out.splitlines()]
    rows = rows_of("page.html")
    assert len(rows) >= 2
    assert [row for row in rows if row not in lines] == []
    page = Path("page.html").read_text("utf-8")
    assert len(page) < 3_000_000 and "default-src 'none'" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)


def test_with_json_the_page_is_written_and_not_named(here, call):
    code, out, _ = call("compare", "one", "two", "--json", "--html", "page.html")
    assert code == 0 and out.startswith("[") and "page.html" not in out
    assert rows_of("page.html")


REFUSED = {
    "ending": ("page.txt", "unknown-page-format", ["page.txt", ".html"]),
    "no ending": ("page", "unknown-page-format", ["page", ".html"]),
    "folder": ("folder.html", "unwritable-file", ["--html", "folder.html", "is a folder"]),
    "absent": ("absent/page.html", "unwritable-file", ["--html", "absent/page.html", "does not exist"]),
}


@pytest.mark.parametrize(("file", "code", "named"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("words", [*COMMANDS.values(), "inspect absent --text absent"], ids=[*COMMANDS, "inspect"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(words, file, code, named, tmp_path, refusal):
    """Nothing that the command names exists here, and it does not come to look for it."""
    (tmp_path / "folder.html").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        check(refusal(*words.split(), "--html", file), *named, code=code)


def test_a_full_disk_is_one_sentence(here, refusal, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("moe_engine.cli.figures.write_atomically", full)
    check(refusal("routing-stats", "counts.csv", "--html", "page.html"), "page.html", "No space left", "--html")


def test_a_measurement_has_no_page(here, refusal):
    check(refusal(*PLAN.split()[:9], "--measure", "--html", "page.html"), "--measure", "--html")


def test_names_of_runs_and_labels_can_do_no_harm(here, call):
    shutil.copytree("one", HOSTILE)
    Path("hostile.csv").write_text(f'layer,split,domain,e0,e1\n0,a,"{HOSTILE}</script>",3,4\n1,b,"{HOSTILE}",4,5\n')
    for words in (
        *(("compare", HOSTILE, "two"), ("replay", HOSTILE), ("routing-stats", HOSTILE)),
        ("routing-stats", "hostile.csv"),
    ):
        assert call(*words, "--html", "page.html")[0] == 0
        text = Path("page.html").read_text("utf-8")
        assert "alert(1)" in text
        assert "<script>alert" not in text and "\x1b" not in text and "\\u001b" not in text
        assert "</script>alert" not in text


def test_runs_of_one_name_are_told_apart(here, call):
    shutil.copytree("one", "there/one")
    assert call("compare", "one", "there/one", "two", "two", "--html", "page.html")[0] == 0
    text = Path("page.html").read_text("utf-8")
    assert '"name": "there/one"' in text and '"name": "two (1)"' in text and '"name": "two (2)"' in text


def test_the_best_run_is_the_verdict(here, call):
    assert call("compare", "one", "two", "--json", "--html", "page.html")[0] == 0
    from moe_engine.run.folder import read_run
    from moe_engine.run.forms import percent

    found = {name: read_run(Path(name)).summary["accuracy"] for name in ("one", "two")}
    best = max(found.values())
    first = " and ".join(name for name, value in found.items() if value == best)
    assert f"{first}: best accuracy, {percent(best)}" in Path("page.html").read_text("utf-8")


def test_the_page_of_a_comparison_says_in_which_settings_the_runs_differ(here, call):
    assert call("compare", "one", "two", "--html", "page.html")[0] == 0
    (part,) = re.findall("<h2>What differs</h2>(.*?)(?=<h2>)", Path("page.html").read_text("utf-8"), re.DOTALL)
    cells = Cells()
    cells.feed(part)
    rows = {row[0]: row[1:] for row in cells.rows if row}
    assert rows["plugins"] == ["switch_aux", "sigmoid_topk"] and rows["switch_aux.weight"] == ["0.01", "-"]
    assert "seed" not in rows and "epochs" not in rows


@pytest.mark.parametrize("nonsense", ["plugins = 3", "[plugins]\nsaturation = 3"])
def test_a_config_of_another_shape_is_refused_in_a_sentence(here, call, nonsense):
    """Whatever its checksum says."""
    (here / "one" / "config.toml").write_text(f"{nonsense}\n[run]\n")
    forge(here / "one")
    code, _, err = call("compare", "one", "two", "--html", "page.html")
    assert code == 2 and "config.toml" in err and len(err.splitlines()) == 1, err
