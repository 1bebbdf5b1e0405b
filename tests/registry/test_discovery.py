"""Finding plugins in metadata, and loading one."""

from importlib import metadata

import attrs
import pytest

from moe_engine import PluginError, hookimpl
from moe_engine.registry.discovery import Found, find, load
from moe_engine.registry.manager import Plugins, broken
from support import refused


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


def test_a_group_of_an_earlier_version_is_refused_with_the_new_name():
    point = metadata.EntryPoint("mine", "elsewhere:Plugin", "moe_engine.sources")
    with pytest.raises(PluginError, match="unknown entry-point group 'moe_engine.sources'; it is now 'moe_engine.init"):
        load(Found("mine", "sources", "elsewhere", "1.0", point))


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
