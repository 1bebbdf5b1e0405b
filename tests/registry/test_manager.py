"""Finding, loading, checking, ordering and blaming plugins."""

import ast
import re
from importlib import metadata
from pathlib import Path

import attrs
import pytest
import torch

from moe_engine import Bias, Engine, Finding, Part, PluginError, RunError, Traits, UsageError, hookimpl, option
from moe_engine.registry.discovery import Found, defaults, find, load
from moe_engine.registry.manager import Plugins, broken
from support import refused

ROOT = Path(__file__).parents[2]


def test_defaults_are_added_and_the_default_router_gives_way():
    usual = defaults()
    names = list(Plugins(["switch_aux"]).active)
    assert names == ["switch_aux", usual["router"], usual["initializer"], *usual["metrics"], *usual["reports"]]
    assert "topk" not in Plugins(["sigmoid_topk"]).active
    assert "random" not in Plugins(["clone"]).active


def test_order_is_the_order_typed():
    engine = Engine("z_loss,loss_free,switch_aux,saturation")
    assert [bound.plugin for bound in engine.plugins.bind("moe_aux_loss")] == ["z_loss", "switch_aux"]
    assert [bound.plugin for bound in engine.plugins.bind("moe_bias")] == ["loss_free", "saturation"]
    assert list(engine.moe(4, 4).biases[0]) == ["loss_free", "saturation"]
    pluggys = [one.plugin_name for one in engine.plugins.manager.hook.moe_aux_loss.get_hookimpls()]
    assert pluggys[::-1] == ["z_loss", "switch_aux"]


def test_without_removes_defaults_and_chosen_plugins():
    names = list(Plugins(["switch_aux", "z_loss"], without=["html", "z_loss"]).active)
    assert "html" not in names
    assert "z_loss" not in names
    with refused("no-router"):
        Plugins([], without=["topk"])
    with refused("unknown-plugin", "htlm", "did you mean 'html'"):
        Plugins([], without=["htlm"])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"moe_ruoter": hookimpl(lambda self, spec: None)},
            "implements 'moe_ruoter', which is not a hook; did you mean 'moe_router'",
        ),
        (
            {"moe_router": hookimpl(lambda self, spec, seed: None)},
            "moe_router asks for 'seed', but the hook offers spec",
        ),
        ({"moe_router": lambda self, spec: None}, "moe_router lacks the decorator @hookimpl"),
        ({"moe_router": hookimpl(lambda spec: None)}, "the first argument of moe_router must be self"),
        ({"moe_router": hookimpl(tryfirst=True)(lambda self, spec: None)}, "plugins act in the order typed"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused_with_its_name(install, body, sentence):
    install("router", "mine", attrs.define(eq=False)(type("Mine", (), body)))
    with pytest.raises(PluginError, match=r"router 'mine' \(elsewhere 1\.0\)") as caught:
        Plugins(["mine"])
    assert sentence in str(caught.value)
    assert sentence in broken()["mine"]
    Plugins(["topk"])  # nobody else is disturbed


@pytest.mark.parametrize("cls", [object(), dict, attrs.define(type("Equal", (), {}))])
def test_what_is_no_plugin_class_is_refused(install, cls):
    install("metric", "mine", cls)
    with refused("not-a-plugin-class", "@attrs.define(eq=False)", kind=PluginError):
        Plugins(["mine"])


def test_a_name_of_two_distributions_is_fatal_only_when_chosen(install):
    empty = attrs.define(eq=False)(type("Empty", (), {}))
    install("metric", "twin", empty, "one")
    install("metric", "twin", empty, "two")
    Plugins(["topk"])
    with refused("plugin-clash", "one", "two", kind=PluginError):
        Plugins(["twin"])


def test_two_metrics_of_one_name_are_an_error_that_names_both(install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_metrics(self, stats):
            return {"cv": 0.0}

    install("metric", "mine", Mine)
    engine = Engine("mine", experts=4)
    layer = engine.moe(3, 4).eval()
    layer(torch.randn(5, 3))
    with refused("duplicate-metric", "'cv'", "mine and balance", kind=RunError):
        engine.metrics("eval")


def test_a_plugin_that_fails_in_a_layer_is_named(install):
    @attrs.define(eq=False)
    class Mine:
        weight: float = option(1.0, help="coefficient")

        @hookimpl
        def moe_aux_loss(self, routing):
            return routing.nothing

    install("loss", "mine", Mine)
    with refused("layer-not-built", "loss 'mine' (elsewhere 1.0) in moe_aux_loss", "Attr", kind=PluginError):
        Engine("mine", experts=4).moe(3, 4)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda routing: routing.load.sum(), "does not depend on the router"),
        (lambda routing: routing.probs, "is of shape [4, 8], not a scalar"),
    ],
)
def test_a_loss_that_can_teach_nothing_is_refused(install, answer, sentence):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_aux_loss(self, routing):
            return answer(routing)

    install("loss", "mine", Mine)
    with refused("bad-loss-term", f"loss 'mine' {sentence}"):
        Engine("mine").moe(3, 4)


def test_a_bias_that_finds_nothing_to_shift_is_refused(install):
    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_bias(self, level):
            return None

    install("bias", "mine", Mine)
    with refused("acts-on-nothing", "bias 'mine'"):
        Engine("mine").moe(3, 4)


def test_a_bias_of_the_wrong_size_is_refused_with_its_own_name(install):
    class Three(Bias):
        def forward(self):
            return torch.zeros(3)

    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_bias(self, level):
            return Three()

    install("bias", "mine", Mine)
    with refused("bias-wrong-shape", "bias 'mine'", "[3]", "8 units", kind=PluginError):
        Engine("mine").moe(3, 4)


def test_a_role_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="role is one of in, output, logit_row, logit_bias, state, not 'row'"):
        Part().expert_param("weight", (3,), fresh=torch.zeros, role="row")


def test_a_router_that_cannot_learn_is_refused(install):
    from moe_engine.plugins.routers.topk import TopKRouter

    @attrs.define(eq=False)
    class Mine:
        @hookimpl
        def moe_router(self, spec):
            return TopKRouter(spec, renorm=True, groups=1, groups_kept=1)

    install("router", "mine", Mine)
    engine = Engine("mine", experts=4, top_k=1)
    layer = engine.moe(3, 4).eval()
    with refused("router-without-gradient", "layer 'moe0'", "level 'expert'"):
        engine.check_learning(lambda: layer(torch.randn(9, 3)).square().mean())


def test_a_router_that_cannot_learn_is_allowed_on_purpose_and_named():
    engine = Engine("topk", ["topk.renorm=true"], experts=4, top_k=1, allow_no_gradient=True)
    allowed, fine = engine.moe(3, 4, name="a").eval(), engine.moe(3, 4, name="b", top_k=2).eval()
    engine.check_learning(lambda: fine(allowed(torch.randn(9, 3))).square().mean())
    remark = engine.plugins.remarks["learning"]
    assert (remark.name, remark.severity) == ("no gradient", 2)
    assert remark.why.startswith("layer 'a': the task gives the router's level 'expert' no gradient")
    assert "'b'" not in remark.why
    with refused("mix-refused", "topk.renorm", "top_k=1"):
        engine.moe(3, 4, allow_no_gradient=False)


def test_a_router_that_learns_is_not_named():
    engine = Engine("topk", experts=4, top_k=1, allow_no_gradient=True)
    layer = engine.moe(3, 4).eval()
    engine.check_learning(lambda: layer(torch.randn(9, 3)).square().mean())
    assert "learning" not in engine.plugins.remarks


def imports(path):
    """(module, level) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level
        elif isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)


def test_core_imports_no_plugin_and_plugins_import_no_plugin():
    for path in (ROOT / "core").rglob("*.py"):
        for module, _ in imports(path):
            assert not module.startswith("moe_engine"), (path, module)
    for path in (ROOT / "plugins").rglob("*.py"):
        for module, level in imports(path):
            assert level == 0, path
            assert not module.startswith("moe_engine.plugins"), (path, module)


def test_core_names_no_plugin():
    """Not even in a string: what is usual is data, in defaults.toml."""
    # these are words of the core too: of records, activations, roles, digests, numbers in a table
    names = set(find()) - {"split", "relu", "gradient", "hash", "random", "entropy", "mutual_information"}
    for path in (ROOT / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, (path, node.value)


# -- traits, remarks, disabled plugins -----------------------------------------------------------------


def plugin(**body):
    return attrs.define(eq=False)(type("Mine", (), body))


def test_a_chosen_plugin_whose_needs_the_router_does_not_give_is_refused_with_both_names(install):
    answer = hookimpl(lambda self, routing: routing.mean(routing.probs).sum())
    install("loss", "mine", plugin(moe_aux_loss=answer, traits=Traits(requires=("smooth_load",))))
    with pytest.raises(
        UsageError, match="loss 'mine' needs a differentiable estimate .*, which router 'topk' does not"
    ):
        Engine("topk,mine", experts=4).moe(4, 4)


def test_what_a_default_plugin_needs_refuses_nothing(install, monkeypatch):
    install(
        "metric", "mine", plugin(moe_metrics=hookimpl(lambda self, stats: {}), traits=Traits(requires=("smooth_load",)))
    )
    usual = defaults()
    monkeypatch.setattr("moe_engine.registry.manager.defaults", lambda: {**usual, "metrics": ["mine"]})
    Engine("topk", experts=4).moe(4, 4)
    with refused("mix-refused", "metric 'mine' needs"):
        Engine("topk,mine", experts=4).moe(4, 4)


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


def test_a_group_of_an_earlier_version_is_refused_with_the_new_name():
    point = metadata.EntryPoint("mine", "elsewhere:Plugin", "moe_engine.sources")
    with pytest.raises(PluginError, match="unknown entry-point group 'moe_engine.sources'; it is now 'moe_engine.init"):
        load(Found("mine", "sources", "elsewhere", "1.0", point))


def test_a_remark_is_kept_and_refuses_nothing(install):
    remark = Finding("odd", 1, "this is odd", "look at it")
    install("metric", "mine", plugin(moe_check=hookimpl(lambda self, setup: remark)))
    engine = Engine("topk,mine", experts=4)
    engine.moe(4, 4)
    assert engine.plugins.remarks == {"mine": remark}


def test_disabled_plugins_are_gone_from_lists_and_defaults_and_refused_when_chosen(monkeypatch):
    monkeypatch.setenv("MOE_ENGINE_DISABLE_PLUGINS", "html, switch_aux")
    assert "html" not in find() and "topk" in find()
    assert "html" not in Plugins(["topk"]).active
    with refused("disabled-plugin", "'switch_aux'", "MOE_ENGINE_DISABLE_PLUGINS"):
        Plugins(["switch_aux"])
    monkeypatch.setenv("MOE_ENGINE_DISABLE_PLUGINS", "topk")
    with refused("no-router"):
        Plugins([])


def test_what_is_disabled_may_be_left_out_too_and_a_disabled_task_says_so(monkeypatch):
    monkeypatch.setenv("MOE_ENGINE_DISABLE_PLUGINS", "html,digits")
    Plugins([], without=["html"])
    with refused("disabled-plugin", "'digits'"):
        Plugins([], task="digits")


def test_a_plugin_that_exits_is_named_like_one_that_raises(install):
    def leave(self, **_):
        raise SystemExit(0)

    install("metric", "mine", plugin(moe_check=hookimpl(lambda self, setup: leave(self))))
    with refused("plugin-failed", "metric 'mine' (elsewhere 1.0)", "SystemExit: 0", kind=PluginError):
        Engine("topk,mine", experts=4).moe(4, 4)
    install("loss", "exits", plugin(moe_aux_loss=hookimpl(lambda self, routing: leave(self))))
    with refused("layer-not-built", "loss 'exits' (elsewhere 1.0)", "SystemExit", kind=PluginError):
        Engine("topk,exits", experts=4).moe(4, 4)
