"""Files that a crash or a second process can't damage."""

import math
import os

import pytest

from moe_engine import UsageError
from moe_engine.files import dump, locked, write_atomically


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    path = tmp_path / "lock"
    with locked(path, tmp_path) as file:
        file.write(b"kept")
        with pytest.raises(UsageError, match=str(tmp_path)), locked(path, tmp_path):
            pass
    with locked(path, tmp_path) as file:
        file.seek(0)
        assert file.read() == b"kept"


def test_json_is_one_line_and_has_no_nan():
    assert dump({"é": [1.5, None, "a\nb"]}) == '{"é": [1.5, null, "a\\nb"]}'
    with pytest.raises(ValueError, match="JSON"):
        dump(math.nan)
