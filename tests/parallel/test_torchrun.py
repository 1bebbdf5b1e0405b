"""The command under torchrun: the same run, one folder, one sentence, a common checkpoint."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from moe_engine import read_sample
from moe_engine.cli import main
from moe_engine.parallel import launch
from warm import MOE_ENGINE

RUN = ["run", "--no-plugin", "html,plots", "--plugins", "topk,saturation,switch_aux,schedule", "--precision", "fp64"]
RUN += ["--steps", "24", "--log-every", "8", "--set", "schedule.at=8,16", "--set", "schedule.max_experts=10"]


def torchrun(*words, ranks=2, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options.get("more", ()), "-m", "moe_engine", *words], env=environment, **pipes)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(one, other):
    """Records of equal shape, whose numbers differ by rounding alone."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_close(mine, theirs)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-10, abs=1e-12)
    else:
        assert one == other


def by_torchrun(words, **_):
    ranks = torchrun(*words)
    out, err = ranks.communicate(timeout=120)
    return ranks.returncode, out, err


def by_variables(words, commands, port):
    """As any other launcher starts two ranks."""
    several = [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"} for rank in range(2)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = [
            commands.start([*MOE_ENGINE, *words], None, {**os.environ, **own, "MASTER_PORT": str(port)}, out, err)
            for own in several
        ]
        codes = [one.wait() for one in started]
        said = [file.seek(0) or file.read() for file in (out, err)]
    return max(codes), *said


@pytest.mark.parametrize("start", [by_variables, pytest.param(by_torchrun, marks=pytest.mark.long)])
def test_two_ranks_write_the_run_of_one_process(tmp_path, capfd, start, commands, free_port):
    alone, both = tmp_path / "alone", tmp_path / "both"
    split = ("--parallel", "shard", "--expert-parallel", "2", "--out", str(both))
    code, out, err = start([*RUN, *split], commands=commands, port=free_port)
    assert main([*RUN, "--out", str(alone)]) == 0
    assert code == 0, err
    assert_close(records(alone), records(both))
    samples = [read_sample(folder) for folder in (alone, both)]
    assert samples[0].rows.tolist() == samples[1].rows.tolist() and len(samples[0].layers) == 1
    for name in ("expert", "gate", "labels", "nearest"):
        mine, theirs = (getattr(sample.layers[0], name) for sample in samples)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    expected = capfd.readouterr().out.replace(str(alone), str(both))
    assert [line.split(":")[0] for line in out.splitlines()] == [line.split(":")[0] for line in expected.splitlines()]
    assert err.count("test ") == sum(record["split"] == "eval" for record in records(both))  # no word twice


@pytest.mark.long
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_that_one_process_continues(tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    words = [word if word != "24" else "200" for word in RUN] + ["--epochs", "99"]
    ranks = torchrun(*words, "--out", str(folder))
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < 3:
        time.sleep(0.1)
    (child,) = [pid for pid in _children(ranks.pid) if "RANK=1" in _environment(pid)]
    os.kill(child, signal.SIGTERM)
    _, err = ranks.communicate(timeout=60)
    assert ranks.returncode and err.count("moe-engine: stopped at step") == 1
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert main([*words, "--out", str(alone), "--quiet"]) == 0
    assert_close(records(alone), records(folder))


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


def test_other_commands_say_that_they_work_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert launch.started() == 1  # not all of torchrun's variables
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert main(["compare", "a", "b"]) == 2
    assert capsys.readouterr().err == "moe-engine: 'compare' works in one process; call it without torchrun\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["compare", "a", "b"]) == 2 and not capsys.readouterr().err
    assert (launch.started(), launch.rank()) == (2, 1)


@pytest.mark.parametrize("words", [("--parallel", "shard"), ("--expert-parallel", "2")])
def test_a_layout_of_several_ranks_is_refused_in_one_process(words, tmp_path, capsys):
    assert main(["run", *words, "--out", str(tmp_path / "run")]) == 2
    assert "torchrun" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_variables_that_are_not_numbers_are_not_those_of_torchrun(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "many")
    assert (launch.started(), launch.rank()) == (1, 0)
