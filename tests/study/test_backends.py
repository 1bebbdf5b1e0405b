"""Grids on clusters: two real workers of which one is killed, the numbers of this machine, and what is refused."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from moe_engine import RunError
from moe_engine.cli import main
from moe_engine.study import grid
from moe_engine.study.clusters import connected
from moe_engine.study.grid import StudyVariant, cells_of, run_grid
from support import refused

pytestmark = pytest.mark.filterwarnings("ignore")  # dask's and ray's own

SETTINGS = {"blobs": {"images": "200", "test_images": "50"}}
VARIANTS = [
    StudyVariant(router, (router,), SETTINGS, {"task": "blobs", "epochs": 2, "device": "cpu"})
    for router in ("topk", "noisy_topk")  # the second one draws in training
]
SEEDS = [0, 1]
NO_RAY = "needs ray: pip install 'moe-engine[ray]'"


def cells_at(out):
    """What is stored of each cell, but for the times that it took."""
    cells = {}
    for path in (out / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        cells[path.name] = cell
        del cell["step_seconds"], cell["summary"]["seconds"], cell["summary"]["speed"], cell["sha256"]
    return cells


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The cells, made by this process, which gives the numbers of loky's (test_grid.py)."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run_grid(VARIANTS, SEEDS, out)
    return cells_at(out)


@contextmanager
def dask_cluster(**words):
    import dask
    from distributed import LocalCluster

    words = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, **words}
    # torch is imported already; a worker that replaces a killed one is no fork, which would hold the folder's lock
    with dask.config.set({"distributed.worker.multiprocessing-method": "fork"}):
        cluster = LocalCluster(**words)
    with cluster:
        yield cluster


@pytest.fixture(scope="module")
def dask_address(expected):
    """Of two workers, forked after all that a run imports has been."""
    pytest.importorskip("distributed", reason="needs dask: pip install 'moe-engine[dask]'")
    with dask_cluster() as cluster:
        yield cluster.scheduler_address


@contextmanager
def one_killed(out):
    """In the body, kill the first process that is in the middle of a cell; yields a list, then of that cell's key."""
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for scratch in out.glob("running/*/run"):
                key, pid, _ = scratch.parent.name.split("-", 2)
                if int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(key)
                    return
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()
    assert killed


def test_compare_plugins_takes_the_address(dask_address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare-plugins", "--routers", "topk,sigmoid_topk", "--task", "blobs", "--epochs", "1", "--seeds", "1"]
    words += ["--set", "blobs.images=200", "--device", "cpu", "--quiet"]
    assert main([*words, "--jobs", "1", "--out", "here"]) == 0
    assert main([*words, "--backend", "dask", "--address", dask_address, "--out", "there"]) == 0
    here, there = (cells_at(Path(out)) for out in ("here", "there"))
    assert len(here) == 3
    assert here == there


def test_dask_runs_the_cells_of_a_killed_worker_again(dask_address, expected, tmp_path):
    out = tmp_path / "out"
    with connected("dask", dask_address) as backend, one_killed(out) as killed:
        records = run_grid(VARIANTS, SEEDS, out, backend=backend)
    assert [record["status"] for record in records] == ["finished"] * 4
    assert killed[0] in {record["key"] for record in records}
    assert cells_at(out) == expected
    assert not (out / "running").exists()


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory):
    """Of a ray node with two processors, started as on a cluster."""
    pytest.importorskip("ray", reason=NO_RAY)
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    start += ["--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    # ray's sockets need a short path
    with tempfile.TemporaryDirectory(prefix="ray") as home, subprocess.Popen([*start, f"--temp-dir={home}"]) as node:
        deadline = time.monotonic() + 60
        ask = [*start[:3], "health-check", f"--address=127.0.0.1:{port}"]
        while subprocess.run(ask, check=False, capture_output=True).returncode:
            assert node.poll() is None and time.monotonic() < deadline
        yield f"127.0.0.1:{port}"
        node.terminate()


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason=NO_RAY)
@pytest.mark.parametrize("started", [False, True])
def test_ray_runs_the_cells_of_a_killed_worker_again(started, expected, tmp_path, monkeypatch, request):
    """On a node of its own, and on one that has been started."""
    out = tmp_path / "out"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = request.getfixturevalue("ray_address") if started else None
    with connected("ray", address, 2) as backend, one_killed(out) as killed:
        records = run_grid(VARIANTS, SEEDS, out, backend=backend)
    assert [record["status"] for record in records] == ["finished"] * 4
    assert killed[0] in {record["key"] for record in records}
    assert cells_at(out) == expected


def test_what_a_cluster_gives_up_is_one_sentence_and_the_next_call_continues(expected, tmp_path):
    """joblib's own backend waits forever here."""
    pytest.importorskip("distributed")
    out = tmp_path / "out"
    with dask_cluster() as cluster:
        cluster.scheduler.allowed_failures = 0
        lost = refused("cluster-gave-up", "continues", kind=RunError)
        with connected("dask", cluster.scheduler_address) as backend, lost, one_killed(out) as killed:
            run_grid(VARIANTS, SEEDS, out, backend=backend)
    assert f"{killed[0]}.json" not in cells_at(out)
    run_grid(VARIANTS, SEEDS, out)
    assert cells_at(out) == expected


# -- what is refused ---------------------------------------------------------------------------------


@contextmanager
def server(says):
    """The address of a program that says this to everyone who calls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with listener.accept()[0] as connection:
                connection.sendall(says)
                connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(params=["dask", "ray"])
def name(request, monkeypatch):
    """A kind of cluster; ray need not be installed for what is refused before it is called."""
    if request.param == "ray" and not importlib.util.find_spec("ray"):
        for module in ("ray", "ray.util", "ray.util.joblib", "ray.util.joblib.ray_backend"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        sys.modules["ray.util.joblib.ray_backend"].RayBackend = object
        sys.modules["ray"].init = lambda **_: pytest.fail("ray itself would wait for minutes")
    return request.param


def test_a_wrong_address_is_one_sentence_and_nothing_is_lost(name, free_port, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare-plugins", "--routers", "topk", "--task", "blobs", "--epochs", "1", "--out", "out", "--quiet"]
    words += ["--set", "blobs.images=200", "--seeds", "1", "--device", "cpu"]
    assert main([*words, "--jobs", "1"]) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capsys.readouterr()
    began = time.monotonic()
    assert main([*words, "--backend", name, "--address", f"127.0.0.1:{free_port}"]) == 2
    assert time.monotonic() - began < 5
    err = capsys.readouterr().err
    assert f"no {name} cluster at 127.0.0.1:{free_port}" in err
    assert err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(name, address):
    with refused("no-cluster", address, "HOST:PORT"), connected(name, address):
        pass


@pytest.mark.parametrize("says", [b"SSH-2.0-OpenSSH\n", b""])
def test_another_program_at_the_address_is_refused(name, says, monkeypatch):
    monkeypatch.setattr("moe_engine.study.clusters.ANSWER_SECONDS", 0.5)
    with server(says) as address, refused("no-cluster", address), connected(name, address):
        pass


def test_an_unknown_scheme_and_rays_client_are_refused(name):
    with refused("no-cluster", "ray://there:1"), connected(name, "ray://there:1"):
        pass


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_missing_package_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, {"dask": "distributed", "ray": "ray"}[name], None)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "growth", "--quick", "--backend", name]) == 2
    err = capsys.readouterr().err
    assert f"pip install 'moe-engine[{name}]'" in err
    assert err.count("\n") == 1


def test_an_address_needs_a_cluster():
    with refused("address-without-cluster", "--backend"), connected("loky", "127.0.0.1:8786"):
        pass


def test_a_scheduler_without_workers_is_refused(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("moe_engine.study.clusters.WORKER_SECONDS", 0.2)
    with dask_cluster(n_workers=0) as cluster, refused("no-workers", cluster.scheduler_address):  # noqa: SIM117
        with connected("dask", cluster.scheduler_address):
            pass


def test_a_worker_with_several_threads_is_refused():
    """Its cells would share one random state."""
    pytest.importorskip("distributed")
    words = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp"}
    with dask_cluster(**words) as cluster, refused("threaded-worker", "--nworkers 2 --nthreads 1"):  # noqa: SIM117
        with connected("dask", cluster.scheduler_address):
            pass


@pytest.fixture
def in_process():
    """A worker that is a thread of this process, so that a test can change what it sees."""
    pytest.importorskip("distributed")
    words = {"n_workers": 1, "processes": False, "protocol": "tcp"}
    with dask_cluster(**words) as cluster, connected("dask", cluster.scheduler_address) as backend:
        yield backend


def test_a_worker_that_does_not_see_the_folder_is_refused(in_process, tmp_path):
    out = tmp_path / "out"
    with refused("worker-without-folder", out):
        run_grid(VARIANTS, [0], out, 1, lambda *_: shutil.rmtree(out / "running"), in_process)


def test_a_worker_runs_a_cell_where_the_grid_was_started(tmp_path, monkeypatch):
    """Folders of data are named from there."""
    monkeypatch.setattr(grid, "_result", lambda *_: {"status": "refused", "reason": os.getcwd()})
    home = tmp_path / "home"
    (home / "running").mkdir(parents=True)
    (home / "cells").mkdir()
    (cell,) = cells_of(VARIANTS[0], [0])
    assert grid._run(cell, home, home)["reason"] == str(home)
    assert Path.cwd() != home


def test_a_worker_of_other_versions_is_refused(in_process, tmp_path, monkeypatch):
    versions = grid.versions

    def other():
        here = threading.current_thread() is threading.main_thread()
        return versions() if here else {**versions(), "torch": "0.1"}

    monkeypatch.setattr(grid, "versions", other)
    with refused("worker-versions", "torch 0.1", versions()["torch"]):
        run_grid(VARIANTS, [0], tmp_path / "out", 1, backend=in_process)
