"""Traits: what a plugin declares about itself, and that the core reads nothing else off it."""

import re
import sys
from contextlib import suppress

import attrs
import pytest

from moe_engine import Engine, PluginError, Traits, UsageError, hookimpl, option
from moe_engine.cli import main
from moe_engine.contract.hookspecs import HOOKS
from moe_engine.contract.options import build, options_of
from moe_engine.contract.traits import (
    DECLARED,
    EFFECTS,
    NONE,
    ROUTER_TRAITS,
    USUAL,
    problem_of,
    provided_by,
    traits_of,
    trial_options_of,
    weight_of,
)
from moe_engine.registry import discovery
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from moe_engine.testing import checks
from moe_engine.testing.plugin_under_test import ClassEntryPoint

# -- the record ----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Bare:
    """A plugin that declares nothing."""

    @hookimpl
    def moe_metrics(self, stats):
        return {}


@attrs.define(eq=False)
class Full:
    """A plugin that declares everything."""

    traits = Traits(requires=("probs", "load"), effects="token_entropy", balanced=1, orphans=True, per_rank=True)
    weight: float = option(0.5, help="coefficient")

    @staticmethod
    def trial_options(folder, dim, hidden):
        return {"weight": 2.0}

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.probs.sum()


def test_a_plugin_without_traits_has_the_defaults():
    for plugin in (Bare, Bare()):
        assert traits_of(plugin) == NONE == Traits()
        assert provided_by(plugin) == USUAL
        assert weight_of(plugin) == 1.0
    assert trial_options_of(Bare) is None


def test_declared_facts_are_read_off_the_class_and_the_instance():
    for plugin in (Full, Full()):
        assert traits_of(plugin).requires == ("probs", "load")
        assert traits_of(plugin).effects == ("token_entropy",)
        traits = traits_of(plugin)
        assert (traits.balanced, traits.orphans, traits.per_rank) == (1, True, True)
    assert weight_of(Full()) == 0.5 and weight_of(Full(weight=3)) == 3.0
    assert trial_options_of(Full)(None, 16, 8) == {"weight": 2.0}


def test_a_router_provides_what_it_declares_even_if_that_is_nothing():
    assert Traits().provides is None
    for provides, expected in (((), ()), ("probs", ("probs",)), (["load", "probs"], ("load", "probs"))):

        @attrs.define(eq=False)
        class Router:
            traits = Traits(provides=provides)

        assert provided_by(Router) == expected


def test_the_usual_traits_of_a_router_exist():
    assert set(USUAL) < set(ROUTER_TRAITS)


def test_traits_are_frozen_and_compare_by_value():
    traits = Traits(requires="load")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        traits.requires = ()
    assert traits == Traits(requires=["load"]) != Traits(requires="probs")
    assert hash(traits) == hash(Traits(requires=("load",)))


@pytest.mark.parametrize("field", ["provides", "requires", "effects"])
def test_an_unknown_word_is_refused_with_its_field(field):
    known = EFFECTS if field == "effects" else ROUTER_TRAITS
    assert getattr(Traits(**{field: known}), field) == tuple(known)
    with pytest.raises(UsageError, match=f"{field}.*'nothing_like_it'"):
        Traits(**{field: ("nothing_like_it",)})


@pytest.mark.parametrize("balanced", [True, "1.0", (1.0,)])
def test_a_value_at_balance_that_is_not_a_number_is_refused(balanced):
    with pytest.raises(UsageError, match="balanced"):
        Traits(balanced=balanced)


def test_only_a_router_provides_traits():
    @attrs.define(eq=False)
    class Provider:
        traits = Traits(provides="probs")

    assert problem_of(Provider, ["moe_router"]) is None
    assert "router" in problem_of(Provider, ["moe_metrics"])
    assert problem_of(Full, ["moe_aux_loss"]) is problem_of(Bare, ["moe_metrics"]) is None


# -- nothing else is read ------------------------------------------------------------------------------

MARK = "moe_engine_impl"  # what @hookimpl leaves on a method; looked for on all that a class has
READS: dict[tuple[type, str], str] = {}  # (plugin class, name) -> the line of the core that read it first


def note(cls, name):
    """Note that a name, not a dunder, was read off a plugin, if the frame that read it belongs to the core."""
    if name.startswith("__") and name.endswith("__"):
        return
    frame = sys._getframe(2)
    module = frame.f_globals.get("__name__", "")
    if not f"{module}.".startswith("moe_engine.") or f"{module}.".startswith("moe_engine.plugins."):
        return
    has_it = any(name in type.__getattribute__(base, "__dict__") for base in type.__getattribute__(cls, "__mro__"))
    if module == problem_of.__module__ and has_it:
        return  # it looks at every name that a class has, for misspelt ones
    READS.setdefault((cls, name), f"{module}:{frame.f_lineno}")


class WatchedType(type):
    """A class that notes which names are read off it."""

    def __getattribute__(cls, name):
        note(cls, name)
        return super().__getattribute__(name)


class Watched(metaclass=WatchedType):
    """A plugin that notes which names are read off it."""

    __slots__ = ()

    def __getattribute__(self, name):
        note(type(self), name)
        return super().__getattribute__(name)


def watched(cls):
    """The same plugin, watched."""
    body = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    return attrs.define(eq=False)(WatchedType(cls.__name__, (Watched, cls), body))


@pytest.fixture(scope="module")
def installed():
    """Every built-in plugin, watched, by name."""
    builtin = {name: found for name, (found, *_) in discovery.find().items() if found.distribution == "moe-engine"}
    return {
        name: [
            attrs.evolve(
                found, entry_point=ClassEntryPoint(name, found.entry_point.group, watched(discovery.load(found)))
            )
        ]
        for name, found in builtin.items()
    }


@pytest.fixture
def reads(installed):
    """What the core reads off plugins during a test: name -> where, for undeclared names; READS has all of them."""
    READS.clear()
    with discovery.pretend(installed):
        yield undeclared
    READS.clear()


def undeclared():
    allowed = {cls: {*HOOKS, *DECLARED, *options_of(cls), MARK} for cls in {cls for cls, _ in READS}}
    return {f"{cls.__name__}.{name}": where for (cls, name), where in READS.items() if name not in allowed[cls]}


def names_read():
    return {name for _, name in READS}


def test_an_undeclared_read_is_noticed(reads, installed):
    """Of an instance and of a class, by getattr, hasattr and a dot, in the core alone."""
    cls = discovery.load(installed["topk"][0])
    for module in ("moe_engine.layer.moe", "moe_engine.plugins.routers.topk", "elsewhere"):
        for statement in ("getattr(cls(), 'colour', None)", "hasattr(cls, 'taste')", "cls.renorm_"):
            with suppress(AttributeError):
                exec(statement, {"__name__": module, "cls": cls})
    assert reads().keys() == {"TopK.colour", "TopK.taste", "TopK.renorm_"}
    assert set(reads().values()) == {"moe_engine.layer.moe:1"}


def test_a_run_reads_only_declared_names(reads, tmp_path):
    """Steps, growth, metrics, checkpoints and reports of a run with plugins of every kind."""
    plugins = ("topk", "saturation", "switch_aux", "schedule", "clone", "churn", "csv")
    given = {"plugins": plugins, "task": "digits", "experts": 4, "epochs": 1, "batch_size": 512, "device": "cpu"}
    config = build(RunConfig, "run", {**given, "no_plugin": ("plots", "html"), "log_every": 2})
    Training(config, {"schedule": {"every": 2}}, tmp_path / "run").run()
    assert reads() == {}
    hooks = {"moe_router", "moe_bias", "moe_aux_loss", "moe_growth", "moe_new_expert", "moe_metrics", "moe_report"}
    assert names_read() >= {*hooks, "moe_task", "traits", "weight"}


@pytest.mark.parametrize("kind", sorted(set(discovery.KINDS.values()) - {"report", "task", "family"}))
def test_an_engine_reads_only_declared_names(reads, installed, kind):
    """An engine with a plugin of each kind, three of a kind at most, is built and takes a step."""
    names = [name for name, (found,) in installed.items() if found.kind == kind]
    for name in names[:: max(1, len(names) // 3)][:3]:
        build_and_step, *_ = checks(name)
        build_and_step()
    assert reads() == {}
    assert "traits" in names_read()


CHECKED = {
    "topk": ("learns_from_the_task", "experts_can_be_added_and_removed", "state_survives_save_and_load"),
    "switch_aux": ("loss_is_unweighted", "value_at_balance_is_as_declared"),
    "clone": ("copies_router_row_copies_it", "experts_can_be_added_and_removed"),
    "balance": ("stats_are_not_modified", "memory_survives_a_checkpoint"),
    "csv": ("written_files_are_listed",),
    "blobs": ("columns_match", "every_router_learns"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_the_checks_read_only_declared_names(reads, name):
    for check in checks(name):
        if check.claim.name in CHECKED[name]:
            check()
    assert reads() == {}
    assert READS


def test_the_list_of_plugins_reads_only_declared_names(reads, capsys):
    assert main(["plugins"]) == main(["plugins", "switch_aux"]) == 0
    assert "switch_aux" in capsys.readouterr().out
    assert reads() == {}


# -- checked when a plugin is loaded --------------------------------------------------------------------


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
        ({"requires": None}, "requires takes words, not None"),
        ({"effects": (["equal_load"],)}, "effects takes words, not ['equal_load']"),
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
        ({"need": ("probs",)}, "the core does not know the class attribute 'need'; did you mean 'traits'?"),
        ({"orphan": True}, "the core does not know the class attribute 'orphan'; did you mean 'traits'?"),
        ({"trait": Traits(requires="load")}, "does not know the class attribute 'trait'; did you mean 'traits'?"),
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
