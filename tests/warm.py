"""Commands in a Python that has imported torch already: each runs in a fork of it, so that it starts at once.

    server.run(["-m", "pytest", "-q"], cwd=folder)   # as `python -m pytest -q` there
    server.start([*MOE_ENGINE, "run"])               # as `moe-engine run`, not waited for
    server.run(["benchmarks/step.py", "--smoke"])    # a script

What Python or torch reads as it starts (PYTHONPATH, OMP_NUM_THREADS) is the server's; all else is the command's own.
`python warm.py SOCKET` is the server, `python warm.py SOCKET WORD...` a command for shell scripts.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time

IMPORTS = (
    *("torch._dynamo", "matplotlib.pyplot", "jinja2"),  # what a run imports only when it must
    *("moe_engine.run.training", "moe_engine.study.page", "moe_engine.testing"),
)
MOE_ENGINE = ("-c", "import sys; from moe_engine.cli import main; sys.exit(main())")


class Server:
    """The process that forks. python: the interpreter, ours unless said; what it sees is what its commands see."""

    def __init__(self, python=sys.executable):
        self.folder = tempfile.TemporaryDirectory(prefix="warm")  # its path must be short
        self.address = os.path.join(self.folder.name, "warm")
        self.process = subprocess.Popen([python, __file__, self.address])
        while not os.path.exists(self.address):
            if self.process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.02)

    def start(self, words, cwd=None, environment=None, stdout=None, stderr=None, session=False):
        """Start `python WORDS`; stdout, stderr: open files, those of this process unless said."""
        return Command(self.address, words, cwd, environment, (stdout, stderr), session)

    def run(self, words, cwd=None, environment=None):
        """As `subprocess.run(..., capture_output=True, text=True)` does."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            code = self.start(words, cwd, environment, stdout, stderr).wait()
            said = [file.seek(0) or file.read() for file in (stdout, stderr)]
        return subprocess.CompletedProcess(words, code, *said)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Command:
    """A started command: its pid, and its exit code when it has ended, -N after signal N."""

    def __init__(self, address, words, cwd, environment, files, session):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        own = [file.fileno() if file else number for number, file in enumerate(files, 1)]
        request = {"words": [str(word) for word in words], "cwd": str(cwd or os.getcwd()), "session": session}
        request["environment"] = dict(os.environ if environment is None else environment)
        socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], own)
        self.replies = self.connection.makefile("rb")
        self.pid = int(self.replies.readline())

    def ended(self):
        return bool(select.select([self.connection], [], [], 0)[0])

    def kill(self, number):
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self):
        code = int(self.replies.readline())
        self.replies.close()
        self.connection.close()
        return code


def serve(address):
    """Accept commands as long as our parent lives; a process of its own waits for each."""
    parent = os.getppid()
    for name in IMPORTS:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".soon")
    listener.listen(64)
    os.rename(address + ".soon", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.setblocking(True)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            attend(connection)
            os._exit(0)
        connection.close()


def attend(connection):
    """Fork once more, for the command; tell its pid, then its exit code."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    process = multiprocessing.get_context("fork").Process(target=become, args=(json.loads(text), files))
    process.start()
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % process.pid)
    process.join()  # that process ends without the seconds that it takes to clear torch from memory
    connection.sendall(b"%d\n" % process.exitcode)


def become(request, files):
    """Run the command in this process, as Python would from the start."""
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    # the server's streams remember whether its own files can be sought in; a terminal can't
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    importlib.invalidate_caches()
    for folder in site.getsitepackages():  # what was installed since
        site.addsitedir(folder)
    sys.path[0] = request["cwd"]  # it was the folder of this file
    sys.argv = request["words"]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-c":
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(Command(sys.argv[1], sys.argv[2:], None, None, (None, None), False).wait())
    serve(sys.argv[1])
