"""Distributions of other people: a good one works like the built-in ones, a broken one disturbs nothing.

One fresh virtual environment holds all of them, as pip installs them; no line of moe-engine is changed.
"""

import json
from types import SimpleNamespace

import pytest
import tomli_w

from warm import MOE_ENGINE, Server

MY_PLUGINS = '''\
import attrs

from moe_engine import LinearRouter, assign, hookimpl, option


@attrs.define(eq=False)
class MyRouter:
    """The K experts of highest tempered softmax probability."""

    heat: float = option(1.0, help="temperature of the softmax", min=0.1, max=10)

    @hookimpl
    def moe_router(self, spec):
        return Tempered(spec, self.heat)


class Tempered(LinearRouter):
    def __init__(self, spec, heat):
        super().__init__(spec)
        self.heat = heat

    def select(self, tokens, levels):
        (level,) = levels
        probs_TE = (level.biased / self.heat).softmax(-1)
        expert_TK = level.select_by(probs_TE).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)


@attrs.define(eq=False)
class MyLoss:
    """E times the sum of squared mean probabilities: 1 at balance."""

    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.experts * routing.mean(routing.probs).square().sum()


@attrs.define(eq=False)
class MyMetric:
    @hookimpl
    def moe_metrics(self, stats):
        return {"busiest": stats.load.max() / stats.load.sum()}
'''

BROKEN = """\
import attrs

from moe_engine import hookimpl


@attrs.define(eq=False)
class Misspelt:
    @hookimpl
    def moe_aux_los(self, routing):
        return routing.probs.sum()


@attrs.define(eq=False)
class Greedy:
    @hookimpl
    def moe_metrics(self, statistics):
        return {}
"""

TWIN = """\
import attrs

from moe_engine import hookimpl


@attrs.define(eq=False)
class Twin:
    @hookimpl
    def moe_metrics(self, stats):
        return {"twin": 1.0}
"""

MINE = ("my_router", "my_loss", "my_metric")
DISTRIBUTIONS = {  # name: (its entry points by group, its modules)
    "my-dist": (
        {
            "routers": {"my_router": "mine:MyRouter"},
            "losses": {"my_loss": "mine:MyLoss"},
            "metrics": {"my_metric": "mine:MyMetric"},
        },
        {"mine": MY_PLUGINS},
    ),
    "broken-dist": (
        {"losses": {"absent": "absent:Absent", "misspelt": "bad:Misspelt"}, "metrics": {"greedy": "bad:Greedy"}},
        {"absent": "raise ImportError('no such library')\n", "bad": BROKEN},
    ),
    "twin-a": ({"metrics": {"twin": "twin_a:Twin"}}, {"twin_a": TWIN}),
    "twin-b": ({"metrics": {"twin": "twin_b:Twin"}}, {"twin_b": TWIN}),
}
ERRORS = {
    "absent": "loss 'absent' (broken-dist 1.0) does not load: ImportError: no such library",
    "greedy": "metric 'greedy' (broken-dist 1.0): moe_metrics asks for 'statistics', "
    "but the hook offers stats, layer, effects, probe and memory",
    "misspelt": "loss 'misspelt' (broken-dist 1.0) implements 'moe_aux_los', which is not a hook; "
    "did you mean 'moe_aux_loss'",
    "twin": "plugin 'twin' is offered by twin-a (twin_a:Twin) and twin-b (twin_b:Twin); uninstall one of them",
}


def write(folder, name):
    """The source tree of a distribution."""
    points, modules = DISTRIBUTIONS[name]
    groups = {f"moe_engine.{group}": plugins for group, plugins in points.items()}
    project = {
        "build-system": {"requires": ["setuptools>=77"], "build-backend": "setuptools.build_meta"},
        "project": {"name": name, "version": "1.0", "dependencies": ["moe-engine"], "entry-points": groups},
        "tool": {"setuptools": {"py-modules": list(modules)}},
    }
    folder.mkdir()
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), "utf-8")
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source, "utf-8")
    return folder


@pytest.fixture(scope="module")
def command(new_venv, tmp_path_factory):
    """`moe-engine` where all the distributions are installed; answers code, out and err."""
    home = tmp_path_factory.mktemp("third_party")
    python = new_venv(home / "venv", [write(home / name, name) for name in DISTRIBUTIONS])

    server = Server(python)

    def call(*argv, cwd=home):
        done = server.run([*MOE_ENGINE, *argv], cwd)
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)

    yield call
    server.stop()


@pytest.fixture(scope="module")
def mine(command, tmp_path_factory):
    """The folder of a run with the three plugins of one distribution."""
    home = tmp_path_factory.mktemp("mine")
    names = ("--plugins", ",".join(MINE), "--no-plugin", "plots,html")
    done = command("run", *names, "--set", "my_router.heat=2", "--epochs", "1", "--quiet", "--out", "run", cwd=home)
    assert not done.code, done.err
    return home / "run"


@pytest.fixture(scope="module")
def checked(command):
    """The exit code of `moe-engine plugins --check`, and what it says of each plugin."""
    done = command("plugins", "--check", "--json")
    return SimpleNamespace(code=done.code, errors={row["name"]: row["error"] for row in json.loads(done.out)})


def rows(text, *distributions):
    """(name, kind, distribution, version) of some distributions' plugins in the output of `plugins --json`."""
    found = [(row["name"], row["kind"], row["distribution"], row["version"]) for row in json.loads(text)]
    return [row for row in found if row[2] in distributions]


# -- the good one ----------------------------------------------------------------------------------


def test_an_installed_plugin_is_listed_with_its_distribution(command):
    """Nothing but `pip install` made it known."""
    expected = [(name, name.removeprefix("my_"), "my-dist", "1.0") for name in ("my_loss", "my_metric", "my_router")]
    assert sorted(expected) == sorted(rows(command("plugins", "--json").out, "my-dist"))


def test_its_options_and_help_are_shown(command):
    """As those of a built-in plugin are."""
    out = command("plugins", "my_router").out
    assert out.startswith("my_router: router (my-dist 1.0)\n\nThe K experts of highest tempered softmax probability.")
    assert "heat: a number, 0.1 to 10  [default: 1.0]\n      temperature of the softmax" in out


def test_its_metric_is_in_every_record(mine):
    """The number of a metric of five lines, for the layer, in training and on the test set."""
    records = [json.loads(line) for line in (mine / "metrics.jsonl").read_text("utf-8").splitlines()]
    layers = [(record["split"], record["layers"]["moe"]) for record in records]
    expected = [(split, pytest.approx(max(layer["load"]))) for split, layer in layers]
    assert expected == [(split, layer["busiest"]) for split, layer in layers]
    assert {"train", "eval"}.issubset(split for split, _ in layers)


def test_its_loss_acts_on_the_router(mine):
    """Its effect on the router is measured, and above 0."""
    records = [json.loads(line) for line in (mine / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert min(record["layers"]["moe"]["effect.my_loss"] for record in records) > 0


def test_the_run_remembers_where_its_plugins_came_from(mine):
    """Name, distribution and version in summary.json, in the order typed; the router replaced the default one."""
    plugins = json.loads((mine / "summary.json").read_text("utf-8"))["plugins"]
    expected = [(name, "my-dist", "1.0") for name in MINE]
    assert expected == [(plugin["name"], plugin["distribution"], plugin["version"]) for plugin in plugins[:3]]
    assert "topk" not in [plugin["name"] for plugin in plugins]


def test_its_option_is_in_the_runs_config(mine):
    """Set on the command line, checked as any other."""
    assert "[plugins.my_router]\nheat = 2.0\n" in (mine / "config.toml").read_text("utf-8")


def test_its_option_is_held_to_its_bounds(command):
    """The bounds are the plugin's, the sentence is the core's."""
    expected = (2, "", "moe-engine: router 'my_router': 'heat' must be <= 10: 11.0\n")
    done = command("run", "--plugins", "my_router", "--set", "my_router.heat=11")
    assert expected == (done.code, done.out, done.err)


# -- the broken ones -------------------------------------------------------------------------------


def test_broken_plugins_are_listed_like_others(command):
    """The list is read from metadata; both plugins of one name are in it."""
    done = command("plugins", "--json")
    expected = [
        *[("twin", "metric", "twin-a", "1.0"), ("twin", "metric", "twin-b", "1.0")],
        *[("absent", "loss", "broken-dist", "1.0"), ("misspelt", "loss", "broken-dist", "1.0")],
        ("greedy", "metric", "broken-dist", "1.0"),
    ]
    assert sorted(expected) == sorted(rows(done.out, "broken-dist", "twin-a", "twin-b"))
    assert not done.code and not done.err


def test_check_tells_what_is_wrong_with_each_and_exits_with_1(checked):
    """A failed import, a misspelt hook, an argument that a hook does not offer, a name offered twice."""
    told = {name: error and error[: len(ERRORS.get(name, ""))] for name, error in checked.errors.items() if error}
    expected = (1, ERRORS)
    assert expected == (checked.code, told)


def test_check_finds_nothing_wrong_with_the_others(checked):
    """The good distribution and all that moe-engine brings."""
    fine = {name for name, error in checked.errors.items() if error is None}
    assert {*MINE, "topk", "switch_aux", "digits"}.issubset(fine)


def test_check_prints_each_error_on_a_line(command):
    """For people: the table, what is broken, and a count."""
    done = command("plugins", "--check")
    *lines, last = done.out.splitlines()
    told = sorted(line.removeprefix("broken: ") for line in lines if line.startswith("broken: "))
    total = len([line for line in lines if line.startswith("  ")])
    expected = [*sorted(ERRORS.values()), f"{total - 5} of {total} plugins are fine"]
    assert expected == [line[: len(error)] for line, error in zip([*told, last], expected, strict=True)]
    assert (done.code, done.err) == (1, "")


@pytest.mark.parametrize("name", ERRORS)
def test_a_broken_plugin_is_fatal_when_chosen(command, tmp_path, name):
    """Exit code 2 and its error; no folder is left."""
    done = command("run", "--plugins", f"my_metric,{name}", cwd=tmp_path)
    assert done.err.startswith(f"moe-engine: {ERRORS[name]}") and done.err.count("\n") == 1
    assert (done.code, done.out, list(tmp_path.iterdir())) == (2, "", [])


@pytest.mark.parametrize("name", ERRORS)
def test_a_broken_plugin_cannot_be_shown(command, name):
    """`plugins NAME` says the same sentence."""
    done = command("plugins", name)
    assert done.err.startswith(f"moe-engine: {ERRORS[name]}") and done.err.count("\n") == 1
    assert (done.code, done.out) == (2, "")


def test_a_run_without_the_broken_ones_is_not_disturbed(mine):
    """They were installed all the time."""
    names = [plugin["name"] for plugin in json.loads((mine / "summary.json").read_text("utf-8"))["plugins"]]
    assert set(ERRORS).isdisjoint(names) and len(names) > 3
