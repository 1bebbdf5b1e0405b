"""Which traits there are, and where a class declares them."""

import re

import attrs
import pytest

from moe_engine import Engine, PluginError, Traits, UsageError, hookimpl, option


def plugin(**body):
    return attrs.define(eq=False)(type("Mine", (), body))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"requires": ("prob",)}, "unknown 'prob'; did you mean 'probs'?"),
        ({"requires": "prob"}, "unknown 'prob'; did you mean 'probs'?"),
        ({"require": ("probs",)}, "no 'require'; did you mean 'requires'?"),
        ({"orphan": True}, "no 'orphan'; did you mean 'orphans'?"),
        ({"effects": ("equal_loads",)}, "unknown 'equal_loads'; did you mean 'equal_load'?"),
        ({"balanced": "1"}, "balanced is a number or None, not '1'"),
        ({"orphans": 1}, "orphans is True or False, not 1"),
    ],
)
def test_a_trait_that_does_not_exist_is_refused_with_the_nearest_one(given, nearest):
    with pytest.raises(UsageError, match=re.escape(nearest)):
        Traits(**given)


def test_one_word_stands_for_a_tuple_of_one():
    assert Traits(requires="load") == Traits(requires=("load",))


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ({"gives": ("probs",)}, "'gives' is now traits = Traits(provides=...)"),
        ({"needs": ("probs",)}, "'needs' is now traits = Traits(requires=...)"),
        ({"need": ("probs",)}, "the class attribute 'need' means nothing to the core; did you mean 'traits'?"),
        ({"orphan": True}, "the class attribute 'orphan' means nothing to the core; did you mean 'traits'?"),
        ({"trait": Traits(requires="load")}, "'trait' means nothing to the core; did you mean 'traits'?"),
        ({"facts": Traits(requires="load")}, "its traits are called 'facts'; call them 'traits'"),
        ({"traits": {"requires": "load"}}, "'traits' is {'requires': 'load'}, not Traits(...)"),
        ({"traits": Traits(provides="load")}, "only a router provides traits"),
    ],
)
def test_what_a_class_declares_is_checked_when_it_is_loaded(install, declared, why):
    """What earlier versions called otherwise, what is misspelt, and what is no record."""
    install("metric", "mine", plugin(moe_metrics=hookimpl(lambda self, stats: {}), **declared))
    with pytest.raises(PluginError, match=re.escape(why)) as caught:
        Engine("topk,mine", experts=4)
    assert "metric 'mine' (elsewhere 1.0)" in str(caught.value)


def test_other_class_attributes_are_the_plugins_own(install):
    """Constants, methods and options of whatever name."""

    def weigh(self):
        return 1

    body = {"LIMIT": 3, "gate": "x", "weigh": weigh, "needs": option(1, help="an option")}
    install("metric", "mine", plugin(moe_metrics=hookimpl(lambda self, stats: {}), **body))
    Engine("topk,mine", experts=4)
