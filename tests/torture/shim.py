"""Operations on a run's folder, each of which may fail or kill the process; and commands in forked processes.

A process that forks has imported torch already, so a command costs the time of its work alone. A shim counts what the
command does to the disk (open, write, fsync, lock, rename, mkdir, unlink, truncate) and strikes at the n-th operation.
Where a case needs no process to itself, `here` runs the command in this one, which takes less time still.
"""

import builtins
import contextlib
import errno
import fcntl
import gc
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import attrs
import pytest
from torch.distributed import TCPStore

import warm
from moe_engine import cli
from moe_engine.registry import discovery
from moe_engine.run.summary import versions

INSTALLED = discovery.find()
LAZY = ("progress", "tables")  # what commands import only when they must
for _name in (*warm.IMPORTS, *(f"moe_engine.cli.{name}" for name in LAZY), "moe_engine.analysis.routing_stats"):
    importlib.import_module(_name)  # once, not in each fork
for _name in ("topk", "saturation", "switch_aux", "schedule", "split", "balance", "health", "blobs"):
    discovery.load(INSTALLED[_name][0])
versions()  # which are looked up once


@attrs.define
class Strike:
    """What happens at the n-th operation, counted from 1; never at 0.

    how: "kill", "half" (half of a write reaches the disk, then a kill) or the name of an errno. stays: every operation
    after it fails as well, as on a disk that stays full.
    """

    at: int = 0
    how: str = "kill"
    stays: bool = False


@attrs.define
class Outcome:
    """How a command ended. code: its exit code, -N after signal N, None if it hung. done: operations on the disk.

    seconds: of a processor. mebibytes: the most memory that it held, what it shares with the process that forked it
    included; 0 of a command in this process.
    """

    code: int | None
    out: str
    err: str
    done: list[str] = attrs.field(factory=list)
    seconds: float = 0.0
    mebibytes: int = 0

    @property
    def sound(self) -> bool:
        """Whether it ended in time, without a traceback or an admitted bug."""
        return self.code is not None and "Traceback" not in self.err and "this is a bug" not in self.err

    @property
    def last(self) -> str:
        """The last line of standard error."""
        return (self.err.splitlines() or [""])[-1]


class Disk:
    """Patches the functions that change files, and strikes."""

    def __init__(self, strike, log):
        self.strike, self.log, self.count = strike, log, 0

    def before(self, what, write=None, path=None):
        """Count an operation; strike if it is the one. write: writes half of what the operation would.

        path: what the error names, as that of the operating system does, where there is a path.
        """
        self.count += 1
        os.write(self.log, f"{what}\n".encode())
        strike = self.strike
        if not strike.at or self.count < strike.at or (self.count > strike.at and not strike.stays):
            return
        if strike.how in ("kill", "half"):
            if strike.how == "half" and write is not None:
                write()
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, strike.how)
        raise OSError(number, os.strerror(number), *([str(path)] if path is not None else []))

    def patch(self):
        """Patch this process for good."""
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        fcntl.flock = self._counted("flock", fcntl.flock)
        opened, os_open = builtins.open, os.open

        def os_open_(path, flags, *args, **kwargs):  # as `Path.touch` opens
            if flags & (os.O_WRONLY | os.O_RDWR) and "/dev/" not in str(path):
                self.before("open", path=path)
            return os_open(path, flags, *args, **kwargs)

        def open_(file, mode="r", *args, **kwargs):
            writes = set(mode) & set("wax+") and isinstance(file, str | os.PathLike) and "/dev/" not in str(file)
            if writes:
                self.before("open", path=file)
            result = opened(file, mode, *args, **kwargs)
            return Counted(result, self) if writes else result

        builtins.open = io.open = open_
        os.open = os_open_

    def _counted(self, name, function):
        def counted(*args, **kwargs):
            self.before(name, path=args[0] if isinstance(args[0], str | os.PathLike) else None)
            return function(*args, **kwargs)

        return counted


class Counted:
    """An open file whose writes are counted."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        def half():
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._disk.before("write", half)
        return self._file.write(content)

    def truncate(self, *size):
        self._disk.before("truncate")
        return self._file.truncate(*size)


def command(words, strike=None, kill_after=None, limit=120, plugins=None, number=signal.SIGKILL, room=None, **streams):
    """Run `moe-engine WORDS` in a fork of this process. kill_after: seconds after which it gets the signal `number`.

    strike: None leaves the disk alone. plugins: {name: (kind, class)} that look installed there. room: bytes of memory
    that it may ask for. streams: out or err, the name of a file that is opened for it.
    """
    _ready()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as log:
        pid = os.fork()
        if not pid:
            files = {"out": out.fileno(), "err": err.fileno()}
            files |= {name: os.open(path, os.O_WRONLY) for name, path in streams.items()}
            if room is not None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
            _become(words, strike, plugins or {}, (files["out"], files["err"], log.fileno()))
        code, usage = _wait(pid, kill_after, number, limit)
        texts = [os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace") for file in (out, err, log)]
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(code, texts[0], texts[1], texts[2].split(), seconds, usage.ru_maxrss >> 10)


def _ready():
    """Get ready to fork."""
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # a growth, which searches all objects for optimizers, need not search these


def on_two_ranks(words, strike=None, struck=0, **how):
    """Two processes run `moe-engine WORDS` as under torchrun, whose store this process keeps.

    Returns the outcome of rank `struck`, to which strike and how apply as for `command`; of a hang if the other one
    does not end by itself.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    _ready()
    with tempfile.TemporaryFile() as sink, pytest.MonkeyPatch.context() as patch:
        for name, value in shared.items():
            patch.setenv(name, value)
        patch.setenv("RANK", str(1 - struck))
        other = os.fork()
        if not other:
            _become(words, None, {}, (sink.fileno(),) * 3)
        patch.setenv("RANK", str(struck))
        outcome = command(words, strike, **how)
        code, _ = _wait(other, None, None, 60)
    return outcome if code is not None else attrs.evolve(outcome, code=None)


class Hang(BaseException):
    """A command in this process takes too long."""


def here(words, limit=60):
    """Run `moe-engine WORDS` in this process, which no strike, signal or hostile plugin should reach."""
    out, err, hung = io.StringIO(), io.StringIO(), []

    def stop(*_):
        hung.append(True)
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), discovery.pretend(INSTALLED):
            code = cli.main([*map(str, words)])
    except Hang:
        code = None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(None if hung else code, out.getvalue(), err.getvalue())


def _become(words, strike, plugins, files):
    """Be the command, and never return."""
    code = 70
    try:
        out, err, log = files
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", write_through=True)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if strike is not None:
            Disk(strike, log).patch()
        with discovery.pretend(with_plugins(plugins)):
            sys.argv = ["moe-engine", *map(str, words)]
            cli.script()
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code)


def with_plugins(plugins):
    """What is installed, and plugin classes of a distribution "elsewhere 1.0"."""
    from importlib.metadata import EntryPoint
    from types import ModuleType

    found = dict(INSTALLED)
    for name, (kind, cls) in plugins.items():
        module = ModuleType(f"elsewhere_{name}")
        module.Plugin = cls
        sys.modules[module.__name__] = module
        group = next(group for group, word in discovery.KINDS.items() if word == kind)
        point = EntryPoint(name, f"{module.__name__}:Plugin", discovery.PREFIX + group)
        found[name] = [discovery.Found(name, kind, "elsewhere", "1.0", point)]
    return found


def _wait(pid, kill_after, number, limit):
    """(exit code, resources) of a child, which is sent a signal after a while, and killed if it takes too long."""
    began, hung = time.monotonic(), False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return (None if hung else os.waitstatus_to_exitcode(status)), usage
        passed = time.monotonic() - began
        if kill_after is not None and passed >= kill_after:
            os.kill(pid, number)
            kill_after = None
        if passed > limit and not hung:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
