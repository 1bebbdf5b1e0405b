"""`view`: a growing run in a browser, on this machine alone."""

import http.client
import json
import shutil
import threading

import pytest

from moe_engine.cli import main
from moe_engine.cli.view import PAUSE, Page, serve
from moe_engine.files import digest, locked
from moe_engine.run.live import read_live, records_of
from moe_engine.run.page import run_page
from moe_engine.run.trees import write_tree
from support import forge, refused

RECORD = {"split": "train", "step": 4, "epoch": 1, "loss": 0.5, "accuracy": 0.9805}
LAYERS = {"moe": {"load": [0.5, 0.5], "cv": 0.0, "gini": 0.0, "maxvio": 0.0, "active": 2}}


def line(**facts):
    return json.dumps({**RECORD, "layers": LAYERS, **facts}) + "\n"


@pytest.fixture
def run(tmp_path):
    """A run that has written one record, and is at work."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text('[run]\ntask = "digits"\nplugins = ["topk"]\nepochs = 3\n')
    (folder / "metrics.jsonl").write_text(line())
    return folder


@pytest.fixture
def ask():
    """ask(content, method, path, host): the status and body of an answer."""
    servers = []

    def request(content, method="GET", path="/", host=None):
        server = serve(content, 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer

    yield request
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("by", ["summary", "checkpoint"])
def test_a_changed_digit_in_what_was_recorded_is_noticed(run, by):
    """By the checksum of the run's end, or by that of its newest checkpoint; lines after that are only parsed."""
    content = (run / "metrics.jsonl").read_bytes()
    if by == "summary":
        forge(run, {"loss": 0.5, "layers": []})
    else:
        (run / "checkpoints").mkdir()
        write_tree(run / "checkpoints" / "step-00000004.safetensors", {"records": digest(content)})
        content += line(step=8).encode()
        (run / "metrics.jsonl").write_bytes(content)
    assert read_live(run).records[0]["accuracy"] == 0.9805
    (run / "metrics.jsonl").write_bytes(content.replace(b"0.9805", b"0.9804"))
    with refused("damaged-run", run, "metrics.jsonl"):
        Page(run).content()


def test_the_page_has_the_newest_numbers_and_figures(run):
    page = run_page(read_live(run), refresh=5)
    assert "step 4, epoch 1 of 3" in page
    assert "<td>98.05</td>" in page and "<th>accuracy %</th>" in page
    assert page.count('<figure class="chart">') >= 3 and '<figure class="heat">' in page
    assert '<meta http-equiv="refresh" content="5">' in page


def test_a_half_written_last_line_is_left_out(run):
    with open(run / "metrics.jsonl", "a") as log:
        log.write(line(step=8)[:25])
    assert [record["step"] for record in read_live(run).records] == [4]
    assert records_of(b"not json\n" + line(step=2).encode()) == [json.loads(line(step=2))]
    assert records_of(b'{"layers": {"moe": 3}, "split": "train", "step": 1}\n') == []


DAMAGED = {
    "no table": ("config.toml", "run = 3\n"),
    "plugins of numbers": ("config.toml", "[run]\nplugins = [3]\n"),
    "words for numbers": ("metrics.jsonl", line(layers={"moe": {"load": ["a"], "cv": "x"}})),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_is_refused_by_its_folder(run, capsys, case):
    name, content = DAMAGED[case]
    (run / name).write_text(content)
    assert main(["view", str(run)]) == 2
    err = capsys.readouterr().err
    assert str(run) in err and "damaged" in err and err.count("\n") == 1


def test_records_of_nonsense_are_left_out():
    deep = b"[" * 100_000 + b"\n"
    assert [record["step"] for record in records_of(deep + line(step="x").encode() + line(step=2).encode())] == [2]


def test_it_is_drawn_again_only_if_the_log_changed_and_not_too_often(run):
    now = [0.0]
    page = Page(run, lambda: now[0])
    page.content()
    now[0] = 100.0
    page.content()
    assert page.drawings == 1  # nothing has changed
    with open(run / "metrics.jsonl", "a") as log:
        log.write(line(step=8))
    assert b"step 8" in page.content()
    with open(run / "metrics.jsonl", "a") as log:
        log.write(line(step=12))
    now[0] += PAUSE - 0.1
    assert b"step 8" in page.content() and page.drawings == 2
    now[0] += 0.1
    assert b"step 12" in page.content() and page.drawings == 3


def test_it_only_reads_and_takes_no_lock(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with locked(run / "metrics.jsonl", run):
        Page(run).content()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_finished_run_is_shown_by_its_report(run):
    (run / "summary.json").write_text("{}")
    (run / "report.html").write_text("the report")
    assert Page(run).content() == b"the report"


def test_only_this_machine_is_answered(ask):
    status, body, answer = ask(lambda: b"page")
    assert (status, body) == (200, b"page")
    assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
    assert ask(lambda: b"page", "HEAD")[:2] == (200, b"")
    for host in ("example.com", "127.0.0.1", "127.0.0.1:1"):
        assert ask(lambda: b"page", host=host)[0] == 403
    assert ask(lambda: b"page", path="/../config.toml")[0] == 404
    assert ask(lambda: b"page", "POST")[0] == 501


def test_a_run_that_vanishes_is_an_answer_too(run, ask):
    page = Page(run)
    shutil.rmtree(run)
    assert ask(page.content)[0] == 503


def test_bad_input_is_refused(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not hold a run" in str(refusal("view", "nowhere"))


def test_the_address_is_printed_and_ctrl_c_ends_it(run, capsys, monkeypatch):
    from moe_engine.cli.view import Server

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", stop)
    assert main(["view", str(run)]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
