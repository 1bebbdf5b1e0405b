"""Faults planted in the code that saves and resumes: `python -m torture.planted`, from the folder tests.

Each is put into a process that then runs the short form, which must fail. It takes minutes, so no test does it.
"""

import importlib
import inspect
import io
import os
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import attrs
import pytest

import torture.shim  # noqa: F401 (imports what the short form needs once, not in each fork)

SHORT = [str(Path(__file__).with_name(name)) for name in ("test_runs.py", "test_commands.py")]
PYTEST = ("-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist")


@attrs.frozen
class Fault:
    """A piece of a function that is replaced by another one. where: of the module in moe_engine, and in it."""

    what: str
    where: str
    old: str
    new: str

    def plant(self):
        """Change the function in this process, whoever has imported it."""
        module_name, _, name = self.where.partition(":")
        module = importlib.import_module(f"moe_engine.{module_name}")
        function = inspect.unwrap(eval(name, vars(module)))
        source = textwrap.dedent(inspect.getsource(function))
        assert self.old in source, self
        source = source[source.index("def ") :].replace(self.old, self.new)
        made = {}
        exec(
            compile(f"from __future__ import annotations\n{source}", function.__code__.co_filename, "exec"),
            vars(module),
            made,
        )
        function.__code__ = made[name.rpartition(".")[2]].__code__

    def found_by(self):
        """The first test of the short form that fails with this fault, or None."""
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            os.close(reading)
            self.plant()
            failed = Failed()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                pytest.main([*PYTEST, *SHORT], plugins=[failed])
            os.write(writing, (failed.name or "").encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as file:
            name = file.read()
        os.waitpid(pid, 0)
        return name or None


class Failed:
    """A plugin of pytest that keeps the name of the first test that failed."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.rpartition("/")[2]


FAULTS = (
    Fault(
        "a file is written in place",
        "files:write_atomically",
        "os.replace(temporary, path)",
        "path.write_bytes(content); temporary.unlink()",
    ),
    Fault("a file is renamed before it is on the disk", "files:write_atomically", "os.fsync(file.fileno())", "pass"),
    Fault("an error names no path", "files:naming", "str(path)) from", "None) from"),
    Fault("a folder is not locked", "files:locked", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    Fault(
        "the checksum of a summary or a cell is not compared", "files:unsealed", "sealed(value)[SEAL] != seal", "False"
    ),
    Fault(
        "the checksum of a checkpoint is not compared",
        "run.trees:read_tree",
        'meta.get("sha256") != found.sum()',
        "False",
    ),
    Fault(
        "a checkpoint that can't be read now counts as damaged",
        "run.trees:read_tree",
        'code="unreadable-file"',
        'code="damaged-file"',
    ),
    Fault(
        "the checksums of a finished run's files are not compared",
        "run.folder:read_run",
        "digest(kept[name]) != known[name]",
        "False",
    ),
    Fault(
        "the records that a checkpoint knows are not compared",
        "run.records:RecordFile.begins",
        'return digest(self.file.read(with_["bytes"])) == with_',
        "return True",
    ),
    Fault(
        "records after a checkpoint are not cut off",
        "run.state:continue_from",
        'run.records.truncate(tree["records"]["bytes"])',
        "pass",
    ),
    Fault(
        "the optimizer is not restored", "run.state:continue_from", 'restore(run.optimizer, tree["optimizer"])', "pass"
    ),
    Fault(
        "the engine is not restored", "run.state:continue_from", 'run.engine.load_state_dict(tree["engine"])', "pass"
    ),
    Fault(
        "the training loop is not restored", "run.state:continue_from", 'run.loop.load_state_dict(tree["loop"])', "pass"
    ),
    Fault("random numbers are not restored", "run.state:continue_from", "set_random_state(draws)", "pass"),
    Fault(
        "the sums since the last log point are not restored",
        "run.loop_state:LoopState.load_state_dict",
        'ScoreSums(list(state["sums"]), list(state["terms"]))',
        "ScoreSums()",
    ),
    Fault(
        "one checkpoint is kept, not two",
        "run.checkpoints:Checkpoints.write",
        "self._files()[-2:]",
        "self._files()[-1:]",
    ),
    Fault(
        "what is not finite is saved",
        "run.training:Training._save",
        "self._finite.",
        "__import__('unittest.mock').mock.Mock().",
    ),
    Fault(
        "what a killed start leaves is refused",
        "run.folder:_is_leftover",
        'path.match(f".{name}.*.tmp")',
        "False",
    ),
    Fault(
        "a folder that was replaced is not noticed",
        "run.records:RecordFile.sync",
        "not self._in_place(self.name)",
        "False",
    ),
)


def main(*words):
    """Plant each fault, or those whose descriptions hold these words; returns 1 if one is not found."""
    missed = 0
    for fault in FAULTS:
        if not words or any(word in fault.what for word in words):
            found = fault.found_by()
            missed += found is None
            print(f"{fault.what}: {found or 'NOT FOUND'}", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
