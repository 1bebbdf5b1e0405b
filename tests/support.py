"""Helpers of the tests that are not fixtures."""

from contextlib import contextmanager

import pytest

from moe_engine import UsageError


@contextmanager
def refused(code, *words, kind=UsageError):
    """Inside, an error of that kind and code is raised, whose sentence names the words; how it is put is free."""
    with pytest.raises(kind) as caught:
        yield caught
    sentence = str(caught.value)
    assert caught.value.code == code, f"{caught.value.code!r}: {sentence}"
    assert [word for word in words if str(word) not in sentence] == [], sentence
