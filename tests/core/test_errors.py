"""Lists and suggestions in the sentences of errors."""

import pytest

from moe_engine import PluginError, RunError, UsageError
from moe_engine.errors import listed, nearest


@pytest.mark.parametrize(("names", "expected"), [("", ""), ("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_names_are_listed_as_in_a_sentence(names, expected):
    assert listed(list(names)) == expected


def test_the_nearest_names_are_suggested_or_all():
    assert nearest("tpok", ["topk", "hash"]) == "did you mean 'topk'?"
    assert nearest("zzz", ["topk", "hash"]) == "choose from hash and topk"
    assert nearest("zzz", []) == "there is none"


def test_bad_input_and_a_failed_run_are_told_apart():
    """A plugin that can't be used is bad input, too."""
    assert issubclass(PluginError, UsageError) and not issubclass(RunError, UsageError)
    assert (UsageError("why").code, UsageError("why", code="no-such-name").code) == ("", "no-such-name")
