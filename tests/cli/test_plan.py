"""`moe-engine plan`: its tables, its JSON, its figure, and what it refuses."""

import json
import subprocess
import sys

import pytest

from moe_engine.cli import main
from sentences import check

SIZES = ("plan", "--layers", 4, "--dim", 64, "--hidden", 128, "--experts", 16, "--sequence", 32, "--batch", 2)
CLUSTER = ("--ranks", 8, "--memory", 1, "--rate", 0.2, "--bandwidth", 1, "--latency", 20)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_table_of_splits_and_one_of_ranks(call):
    """One split is marked as the best, and the table of ranks has it for 8 ranks."""
    code, out, err = call(*SIZES, *CLUSTER)
    assert (code, err) == (0, "")
    splits, ranks = out.split("\n\n")
    rows = splits.splitlines()[1:]
    assert [row.split("  ")[0].strip() for row in rows] == ["8 x 1", "4 x 2", "2 x 4", "1 x 8"]
    (best,) = (row for row in rows if row.rstrip().endswith("best"))
    of_8 = next(line for line in ranks.splitlines() if line.startswith("8 "))
    assert best.split("  ")[0].strip() in of_8
    assert [line.split()[0] for line in ranks.splitlines()[1:6]] == ["1", "2", "4", "8", "16"]
    assert "it " in ranks and "scal" in ranks


def test_json_has_exact_bytes_and_nothing_else(call):
    """Of 64 tokens, each to two experts: 128 rows of 64 values, of which a rank of two sends half."""
    code, out, err = call(*SIZES, *CLUSTER, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [split["experts"] for split in report["splits"]] == [1, 2, 4, 8]
    by_experts = {split["experts"]: split for split in report["splits"]}
    assert by_experts[1]["exchange_bytes"] == 0
    assert by_experts[2]["exchange_bytes"] == 4 * (4 * 64 * 64 * 4 + 8 * 8)
    assert by_experts[2]["exchange_bytes_of_all_ranks"] == 8 * by_experts[2]["exchange_bytes"]
    assert report["best"] == min(report["splits"], key=lambda split: split["seconds"]["step"])
    for split in report["splits"]:
        parts = split["memory"]
        assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
        assert split["tokens_per_second"] == pytest.approx(8 * 64 / split["seconds"]["step"])
    assert report["ranks"][0]["ranks"] == 1 and report["ranks"][-1]["ranks"] == 1000
    assert report["cluster"]["bandwidth"] == 1e9 and report["cluster"]["latency"] == pytest.approx(2e-5)


def test_splits_that_do_not_fit_are_named(call):
    """On a rank with room for an eighth of the experts, but not for all."""
    words = [word if word != 1 else 0.004 for word in CLUSTER[:4]]
    code, out, _ = call(*SIZES, *words, *CLUSTER[4:], "--batch", 1, "--optimizer", "sgd")
    assert code == 0
    assert "too large for 0.004 GB: 8 x 1 (" in out


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_a_figure_is_written(call, tmp_path, name):
    code, out, _ = call(*SIZES, *CLUSTER, "--skew", 1, "--plot", name)
    assert code == 0 and out.endswith(f"figure: {name}\n")
    assert (tmp_path / name).stat().st_size > 5000


REFUSED = {
    "skew": (["--skew", 7.5], "impossible-skew", ["7.5", "16 experts", "0 to 7"]),
    "top_k": (["--top-k", 17], "bad-layer-spec", ["17", "16 experts"]),
    "no room": (["--memory", 0.0001], "does-not-fit", ["8 ranks", "0.0001 GB"]),
    "sequences": (["--total-batch", 4], "more-ranks-than-sequences", ["8 ranks", "4 sequences"]),
    "rate": (["--rate", 0], "bad-cluster", ["--rate"]),
    "nan": (["--bandwidth", "nan"], "bad-cluster", ["--bandwidth", "nan"]),
    "inf": (["--memory", "inf"], "bad-cluster", ["--memory", "inf"]),
    "latency": (["--latency", -1], "bad-cluster", ["--latency"]),
    "tokens": (["--sequence", 10**15], "sizes-too-large", ["10^18 bytes"]),
    "weights": (["--hidden", 10**400], "sizes-too-large", ["10^18 bytes"]),
    "node": (["--node", 4], "half-a-node", ["--node-bandwidth"]),
    "fast node": (["--node-bandwidth", 4], "half-a-node", ["--node"]),
    "figure": (["--plot", "plan.txt"], "unknown-figure-format", ["plan.txt", ".svg"]),
    "no figure": (["--plot", "no/plan.svg"], "unwritable-file", ["no/plan.svg", "--plot"]),
}


@pytest.mark.parametrize(("argv", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_refused(refusal, argv, code, words):
    """In one sentence, with exit code 2."""
    sizes = SIZES[:-2] if "--total-batch" in argv else SIZES
    check(refusal(*sizes, *CLUSTER, *argv), *words, code=code)


def test_a_plan_needs_a_cluster_and_one_batch(refusal):
    check(refusal(*SIZES, "--rate", 1), "--ranks", "--memory", "--bandwidth", "--measure", code="no-cluster")
    check(refusal(*SIZES, *CLUSTER, "--total-batch", 64), "--batch", "--total-batch", code="two-batches")
    check(refusal("plan", *CLUSTER), "--layers")


def test_measuring_prints_the_flags_to_use(call):
    """They can be put on the command line as they are; alone there is no connection to measure."""
    code, out, err = call(*SIZES, "--measure")
    assert (code, err) == (0, "") and out.startswith("--rate ")
    measured = out.split()
    assert len(measured) == 2
    assert call(*SIZES, *CLUSTER, *measured)[0] == 0
    assert json.loads(call(*SIZES, "--measure", "--json")[1])["rate"] > 0


def test_planning_does_not_import_torch(tmp_path):
    words = [str(word) for word in (*SIZES, *CLUSTER, "--skew", 1)]
    code = f"import sys; from moe_engine.cli import main; assert main({words}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


@pytest.mark.long
def test_ranks_of_a_launcher_measure_together(tmp_path):
    """The first of them prints the flags, once."""
    words = [str(word) for word in (*SIZES, "--measure")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "moe_engine", *words]
    done = subprocess.run(launcher, check=True, capture_output=True, text=True, cwd=tmp_path)
    (line,) = done.stdout.splitlines()
    assert line.split()[::2] == ["--rate", "--bandwidth", "--latency", "--ranks"] and line.endswith(" 2")


def test_the_help_names_the_assumptions(capsys):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("deduplicated", "overlap", "power", "--measure"))
