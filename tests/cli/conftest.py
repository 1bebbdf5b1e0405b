"""What the tests of the command line share."""

from pathlib import Path

import pytest

from moe_engine import cli
from sentences import sentence_of


@pytest.fixture
def call(capsys, monkeypatch):
    """call(*words): (exit code, standard output, standard error). call.error is the exception that ended it."""
    ending = cli._ending

    def record(error):
        run.error = error
        return ending(error)

    def run(*argv):
        run.error = None
        code = cli.main([str(word) for word in argv])
        return (code, *capsys.readouterr())

    monkeypatch.setattr(cli, "_ending", record)
    return run


@pytest.fixture
def refusal(call):
    """refusal(*words): the sentence that refuses bad input, with its code.

    Exit code 2, one line, silence on standard output, and a folder as it was, are checked.
    """

    def tree():
        return sorted(str(path) for path in Path().rglob("*"))

    def run(*argv):
        before = tree()
        code, out, err = call(*argv)
        assert (2, "", before) == (code, out, tree()), err
        return sentence_of(err, call.error)

    return run
