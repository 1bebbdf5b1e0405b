"""Finding, loading, checking, ordering and blaming plugins."""

import ast
from pathlib import Path

import attrs
import pytest

from moe_engine import Engine, Finding, PluginError, Traits, UsageError, hookimpl
from moe_engine.registry.discovery import defaults, find
from moe_engine.registry.manager import Plugins
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


def imports(path):
    """(module, level) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level
        elif isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)


def test_core_imports_no_plugin_and_plugins_import_no_plugin():
    # which strategy decides as a foreign block does is known where foreign blocks are
    for path in set((ROOT / "core").rglob("*.py")) - {ROOT / "core" / "pretrained" / "families.py"}:
        for module, _ in imports(path):
            assert not module.startswith("moe_engine"), (path, module)
    for path in (ROOT / "plugins").rglob("*.py"):
        for module, level in imports(path):
            assert level == 0, path
            assert not module.startswith("moe_engine.plugins"), (path, module)


def test_core_names_no_plugin():
    """Not even in a string: what is usual is data, in default_plugins.toml."""
    # these are words of the core too: of records, activations, roles, digests, numbers in a table, others' columns, and
    # the public functions `prune` and `upcycle`, and an argument of transformers' generate()
    words = {"split", "relu", "gradient", "hash", "random", "entropy", "mutual_information", "topk", "prune", "upcycle"}
    words |= {"top_p"}
    names = set(find()) - words
    # which strategy decides as a foreign block does is known where foreign blocks are
    for path in set((ROOT / "core").rglob("*.py")) - {ROOT / "core" / "pretrained" / "families.py"}:
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


def test_a_remark_is_kept_and_refuses_nothing(install):
    remark = Finding("odd", 1, "this is odd", "look at it")
    install("metric", "mine", plugin(moe_check=hookimpl(lambda self, setup: remark)))
    engine = Engine("topk,mine", experts=4)
    engine.moe(4, 4)
    assert engine.plugins.remarks == {"mine": remark}


def test_a_plugin_that_exits_is_named_like_one_that_raises(install):
    def leave(self, **_):
        raise SystemExit(0)

    install("metric", "mine", plugin(moe_check=hookimpl(lambda self, setup: leave(self))))
    with refused("plugin-failed", "metric 'mine' (elsewhere 1.0)", "SystemExit: 0", kind=PluginError):
        Engine("topk,mine", experts=4).moe(4, 4)
    install("loss", "exits", plugin(moe_aux_loss=hookimpl(lambda self, routing: leave(self))))
    with refused("layer-not-built", "loss 'exits' (elsewhere 1.0)", "SystemExit", kind=PluginError):
        Engine("topk,exits", experts=4).moe(4, 4)
