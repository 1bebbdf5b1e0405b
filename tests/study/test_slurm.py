"""The scripts of docs/slurm.md, as they stand there, with small programs in the place of SLURM's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/slurm.md"
TRAIN, STUDY = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
SHIMS = {
    # every task of a step, on this machine
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
for task in $(seq "$SLURM_NTASKS"); do "$@" & done
trap 'kill $(jobs -p)' TERM
wait || wait
""",
    "scontrol": 'case $1 in show) echo localhost;; *) echo "$*" >>scontrol.log;; esac',
    "hostname": "echo localhost",
}
TINY = """
title = "Tiny"
question = "Does it run?"
source = "nobody"
seeds = 6
[base.run]
task = "blobs"
epochs = 4
device = "cpu"
[base.set.blobs]
images = 200
test_images = 50
[axis.method.nothing]
[[part]]
name = "main"
title = "All"
columns = ["accuracy"]
[part.cross]
method = []
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch, free_port):
    """sbatch(script, *words): start a job of one node with two tasks, whose output goes to a file."""
    monkeypatch.chdir(tmp_path)
    Path("bin").mkdir()
    for name, text in SHIMS.items():
        file = Path("bin", name)
        file.write_text("#!/bin/bash\n" + text)
        file.chmod(0o755)
    found = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    # the scripts compute their port from the job's id
    job = {"SLURM_JOB_ID": str(free_port), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"}
    started = []

    def start(script, *words, **environment):
        Path("job.sh").write_text(script)
        with open("job.log", "a") as log:
            environment = {**os.environ, "PATH": os.pathsep.join(found), **job, **environment}
            command = ["bash", "job.sh", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    start.job = job["SLURM_JOB_ID"]
    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def ended(job, seconds=120):
    code = job.wait(timeout=seconds)
    return code, Path("job.log").read_text()


@pytest.mark.parametrize("script", [TRAIN, STUDY])
def test_bash_reads_the_script(script):
    done = subprocess.run(["bash", "-n"], check=False, input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def wait_for(pattern, seconds=60):
    deadline = time.monotonic() + seconds
    while not list(Path().glob(pattern)):
        assert time.monotonic() < deadline, Path("job.log").read_text()
        time.sleep(0.02)


@pytest.mark.long
def test_a_study_that_is_queued_again_continues(sbatch):
    pytest.importorskip("distributed")
    Path("tiny.toml").write_text(TINY)
    job = sbatch(STUDY, "tiny.toml", "--out", "out")
    wait_for("out/cells/*.json")
    job.send_signal(signal.SIGUSR1)  # to the script alone, as with --signal=B:
    code, log = ended(job)
    assert code == 128 + signal.SIGUSR1, log
    assert Path("scontrol.log").read_text() == f"requeue {sbatch.job}\n"
    before = {file.name: file.stat().st_mtime_ns for file in Path("out/cells").glob("*.json")}
    assert len(before) < 6
    code, log = ended(sbatch(STUDY, "tiny.toml", "--out", "out"))
    assert code == 0, log
    after = {file.name: file.stat().st_mtime_ns for file in Path("out/cells").glob("*.json")}
    assert len(after) == 6
    assert before.items() <= after.items()
    assert json.loads(Path("out/study.json").read_text())["rows"][0]["seeds"] == list(range(6))


@pytest.mark.long
def test_a_training_that_is_queued_again_continues(sbatch):
    words = ["--task", "blobs", "--epochs", "40", "--device", "cpu", "--set", "blobs.images=400", "--quiet"]
    words += ["--checkpoint-every", "5", "--log-every", "2", "--plugins", "switch_aux"]
    ranks = {"SLURM_NTASKS": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"}
    job = sbatch(TRAIN, *words, **ranks)
    wait_for("runs/*/checkpoints/*.safetensors")
    job.send_signal(signal.SIGUSR1)
    code, log = ended(job)
    assert (code, Path("scontrol.log").read_text()) == (0, f"requeue {sbatch.job}\n"), log
    (folder,) = Path("runs").iterdir()
    stopped = int(re.search(r"stopped at step (\d+)", log)[1])
    assert list(folder.glob(f"checkpoints/step-{stopped:08}.safetensors"))
    code, log = ended(sbatch(TRAIN, *words, **ranks))
    assert code == 0, log
    assert [folder] == list(Path("runs").iterdir())
    again = (folder / "metrics.jsonl").read_text()
    shutil.rmtree("runs")
    code, log = ended(sbatch(TRAIN, *words, **ranks))
    assert again == (folder / "metrics.jsonl").read_text()
