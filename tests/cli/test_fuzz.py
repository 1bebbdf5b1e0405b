"""Whatever is typed: one sentence and exit code 2 for bad input, and never a traceback.

An example mixes good ingredients with one that is bad by construction. An ingredient sets some names, by
flags, by --set or in the config file; no good ingredient sets a name of the bad one.
"""

import contextlib
import io
import math
import os
import random
import string

import attrs
import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_engine import RunError, cli
from moe_engine.contract.options import options_of
from moe_engine.contract.traits import USUAL, traits_of
from moe_engine.registry import discovery
from moe_engine.run.config import RunConfig

INSTALLED = discovery.find()
DEFAULTS = discovery.defaults()
ROUTERS, LOSSES, TASKS = (
    sorted(name for name, found in INSTALLED.items() if found[0].kind == kind) for kind in ("router", "loss", "task")
)
ACTIVE = [DEFAULTS["router"], *DEFAULTS["metrics"], DEFAULTS["task"]]  # in a run that names no plugin
OPTIONS = {
    (plugin, name): option
    for plugin in ACTIVE
    for name, option in options_of(discovery.load(INSTALLED[plugin][0])).items()
}
RUN = options_of(RunConfig)
ACCEPTED = "the input was accepted"


def fuzz(examples):
    """The settings of a test: the same examples each time, none kept on disk."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory):
    """An empty folder to run in; installed plugins are looked up once; accepted input does not train."""

    def run(_):
        raise RunError(ACCEPTED)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        stack.enter_context(discovery.pretend(INSTALLED))
        patch.setattr("moe_engine.run.training.Training.run", run)
        yield


def outcome(argv, config=None):
    """(exit code, standard error) of the command line; config: bytes of the file c.toml for `run`."""
    if config is not None:
        with open("c.toml", "wb") as file:
            file.write(config)
        argv = [*argv, "--config", "c.toml"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    assert not out.getvalue()
    assert {"c.toml"}.issuperset(os.listdir())
    return code, err.getvalue()


def check_refused(argv, config=None):
    """Check that a bad command line ends with exit code 2 and one line, which does not speak of a bug."""
    code, err = outcome(argv, config)
    expected = (2, 1, True, False)
    assert expected == (code, *shape(err)), err


def shape(err):
    """(number of lines, whether they are whole and begin with the program, whether they speak of a bug)."""
    whole = err.startswith("moe-engine: ") and err.endswith("\n")
    return len(err.splitlines()), whole, "this is a bug" in err or ACCEPTED in err


# -- values ----------------------------------------------------------------------------------------

NAME = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
UNKNOWN = NAME.filter(lambda name: name not in INSTALLED)
# no NUL: an argument of a process can't hold it; no surrogates: a TOML file can't
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
DATE = st.dates() | st.datetimes() | st.times()
NO_NUMBER = st.sampled_from([math.nan, math.inf, -math.inf])
KINDS = {"true or false": bool, "a whole number": int, "a number": float, "a word": str, "a list of words": tuple}
YES_NO = ("true", "yes", "on", "1", "false", "no", "off", "0")


def is_number(text):
    """Can Python read it as a number?"""
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


NO_NUMBERS = TEXT.filter(lambda text: not is_number(text))
BAD_TEXTS = {  # on the command line; any text is a word
    bool: TEXT.filter(lambda text: text.strip().lower() not in YES_NO) | st.sampled_from(["truee", "2", "1.0", "-1"]),
    int: NO_NUMBERS | st.sampled_from(["1.5", "1e3", "0x10", "1 2", "nan", "\u0663.5"]),
    float: NO_NUMBERS | st.sampled_from(["1/2", "1,5", "1e999", "-inf", "nan", "0x1p3"]),
}
TOO_LARGE = st.integers(309, 4000).map(lambda digits: 10**digits)  # for a float
BAD_VALUES = {  # in the file
    bool: st.floats() | st.integers(2) | st.integers(max_value=-1) | st.lists(st.booleans(), max_size=2),
    int: st.floats() | st.booleans() | st.lists(st.integers(), max_size=2) | DATE,
    float: NO_NUMBER | TOO_LARGE | st.booleans() | st.lists(st.floats(), max_size=2),
    str: st.integers() | st.floats() | st.booleans() | DATE | st.lists(TEXT, max_size=2),
    tuple: TEXT | st.integers() | st.booleans() | st.lists(TEXT, max_size=1).map(lambda words: [*words, 3]),
}


def kind_of(option):
    """The type of an option."""
    return KINDS[option.type.removesuffix(" or none")]


def out_of_bounds(option):
    """Strategies for the numbers beyond an option's bounds."""
    number = {int: st.integers, float: lambda *bounds: st.floats(*bounds, allow_nan=False)}.get(kind_of(option))
    if option.min is not None:
        yield number(None, option.min).filter(lambda value: value < option.min)
    if option.max is not None:
        yield number(option.max, None).filter(lambda value: value > option.max)


def refused_texts(option):
    """Texts that an option refuses."""
    texts = [BAD_TEXTS[kind_of(option)]] if kind_of(option) in BAD_TEXTS else []
    texts += [beyond.map(str) for beyond in out_of_bounds(option)]
    return st.one_of(texts).filter(lambda text: text.strip().lower() != "none")


def refused_values(option):
    """TOML values that an option refuses."""
    return st.one_of(BAD_VALUES[kind_of(option)], *out_of_bounds(option))


# -- ingredients -----------------------------------------------------------------------------------


@attrs.frozen
class Ingredient:
    """Settings of some names. words: of the command line. run, plugins, tables: of the file."""

    names: frozenset
    words: tuple = ()
    run: dict = attrs.field(factory=dict)
    plugins: dict = attrs.field(factory=dict)
    tables: dict = attrs.field(factory=dict)


def flag(name, text):
    return Ingredient(frozenset([name]), (f"--{name.replace('_', '-')}={text}",))


def entry(name, value):
    return Ingredient(frozenset([name]), run={name: value})


def one_of_both(name, values):
    """A flag, or an entry of the file."""
    return values.flatmap(lambda value: st.sampled_from([flag(name, value), entry(name, value)]))


def setting(plugin, name, text):
    return Ingredient(frozenset([f"{plugin}.{name}"]), ("--set", f"{plugin}.{name}={text}"))


def option(plugin, name, value):
    return Ingredient(frozenset([f"{plugin}.{name}"]), plugins={plugin: {name: value}})


def table(name, value):
    """A table other than [run] and [plugins], or a value that replaces one of them."""
    return Ingredient(frozenset([name]), tables={name: value})


def chosen(*plugins):
    """Plugins, by flag or by entry."""
    return st.sampled_from([flag("plugins", ",".join(plugins)), entry("plugins", list(plugins))])


def words(*typed):
    """Words that set no name."""
    return Ingredient(frozenset(), typed)


FREE = [  # losses that object to no other good ingredient
    name
    for name in LOSSES
    if not hasattr(cls := discovery.load(INSTALLED[name][0]), "moe_check") and {*traits_of(cls).requires} <= {*USUAL}
]
GOOD = st.one_of(
    one_of_both("experts", st.integers(2, 64)),
    one_of_both("top_k", st.sampled_from([1, 2])),
    one_of_both("capacity", st.sampled_from([0.5, 1.0, 1.25])),
    one_of_both("epochs", st.integers(1, 9)),
    one_of_both("batch_size", st.integers(1, 999)),
    one_of_both("lr", st.floats(0, 1)),
    one_of_both("seed", st.integers(0)),
    one_of_both("device", st.just("cpu")),
    one_of_both("data_dir", TEXT),
    one_of_both("log_every", st.integers(1)),
    st.lists(st.sampled_from(FREE), unique=True, min_size=1).flatmap(lambda names: chosen(*names)),
    st.sampled_from([flag("no_plugin", "html,plots"), entry("no_plugin", ["plots"])]),
    st.floats(0, 1).map(lambda value: setting("health", "dead", value)),
    st.floats(0, 9).map(lambda value: option("health", "imbalance", value)),
)

NO_OPTION = NAME.map(lambda name: f"x{name}")
NO_TASK = UNKNOWN | TEXT.map(lambda text: f"{text}?") | st.sampled_from(LOSSES)
NO_DEVICE = (
    TEXT.filter(lambda text: text.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"))
    | TEXT.filter(lambda text: text != "0").map(lambda text: f"cpu:{text}")
    | TEXT.map(lambda text: f"auto:{text}")
)
TOO_MANY_CHOICES = st.integers(1, 50).flatmap(
    lambda experts: st.integers(experts + 1, 99).map(lambda top_k: {"experts": experts, "top_k": top_k})
)
BAD = {
    "text of a flag": st.sampled_from([name for name in RUN if kind_of(RUN[name]) in BAD_TEXTS]).flatmap(
        lambda name: refused_texts(RUN[name]).map(lambda text: flag(name, text))
    ),
    "value of an entry": st.sampled_from(list(RUN)).flatmap(
        lambda name: refused_values(RUN[name]).map(lambda value: entry(name, value))
    ),
    "text of a setting": st.sampled_from(list(OPTIONS)).flatmap(
        lambda name: refused_texts(OPTIONS[name]).map(lambda text: setting(*name, text))
    ),
    "value of an option": st.sampled_from(list(OPTIONS)).flatmap(
        lambda name: refused_values(OPTIONS[name]).map(lambda value: option(*name, value))
    ),
    "unknown flag": NAME.map(lambda name: words(f"--x{name}")) | TEXT.map(lambda text: words(f"--x{text}")),
    "stray word": TEXT.filter(lambda text: not text.startswith("-")).map(words),
    "unknown entry": NAME.filter(lambda name: name not in RUN).map(lambda name: entry(name, 1)),
    "unknown table": st.tuples(NO_OPTION, st.integers() | st.just({}) | TEXT).map(lambda pair: table(*pair)),
    "no table": st.tuples(st.sampled_from(["run", "plugins"]), st.integers() | TEXT).map(lambda pair: table(*pair)),
    "shapeless setting": TEXT.filter(lambda text: "=" not in text).map(lambda text: words("--set", text)),
    "setting of no plugin": st.tuples(UNKNOWN, NAME, TEXT).map(lambda parts: setting(*parts)),
    "option of no plugin": st.tuples(UNKNOWN, NAME, st.integers()).map(lambda parts: option(*parts)),
    "unknown setting": st.tuples(st.sampled_from(ACTIVE), NO_OPTION, TEXT).map(lambda parts: setting(*parts)),
    "unknown option": st.tuples(st.sampled_from(ACTIVE), NO_OPTION, DATE).map(lambda parts: option(*parts)),
    "unknown plugin": UNKNOWN.flatmap(lambda name: chosen(LOSSES[0], name)),
    "plugin of strange letters": TEXT.map(lambda text: text.replace(",", "") + "?").flatmap(chosen),
    "unknown plugin to leave out": UNKNOWN.flatmap(
        lambda name: st.sampled_from([flag("no_plugin", name), entry("no_plugin", [name])])
    ),
    "plugin twice": st.sampled_from(sorted(INSTALLED)).flatmap(lambda name: chosen(name, name)),
    "two routers": st.permutations(ROUTERS).flatmap(lambda names: chosen(*names[:2])),
    "task as plugin": st.sampled_from(TASKS).flatmap(lambda name: chosen(LOSSES[0], name)),
    "no task": one_of_both("task", NO_TASK),
    "no device": one_of_both("device", NO_DEVICE),
    "too many choices": TOO_MANY_CHOICES.map(lambda sizes: Ingredient(frozenset(sizes), run=sizes)),
    "no router": st.sampled_from([flag("no_plugin", "html,topk"), entry("no_plugin", ["topk"])]),
    "constant gate": st.just(Ingredient(frozenset(["top_k", "topk.renorm"]), ("--top-k=1", "--set", "topk.renorm=on"))),
}


def cooked(ingredients, seed):
    """(words, config file or None) of ingredients in any order; of two that set one name the first is taken."""
    kept, taken = [], set()
    for ingredient in ingredients:
        if taken.isdisjoint(ingredient.names):
            kept.append(ingredient)
            taken |= ingredient.names
    random.Random(seed).shuffle(kept)
    run, plugins, tables = {}, {}, {}
    for ingredient in kept:
        run |= ingredient.run
        tables |= ingredient.tables
        for plugin, options in ingredient.plugins.items():
            plugins.setdefault(plugin, {}).update(options)
    config = {name: entries for name, entries in (("run", run), ("plugins", plugins)) if entries} | tables
    text = tomli_w.dumps(config).encode() if config else None
    return ["run", "--quiet", *(word for ingredient in kept for word in ingredient.words)], text


# -- what must hold --------------------------------------------------------------------------------

GOODS, SEED = st.lists(GOOD, max_size=4), st.integers(0, 999)


@fuzz(40)
@given(GOODS, SEED)
def test_good_ingredients_alone_are_accepted(goods, seed):
    """Below, then, the bad ingredient is the reason for the refusal."""
    expected = (1, f"moe-engine: {ACCEPTED}\n")
    assert expected == outcome(*cooked(goods, seed))


@pytest.mark.parametrize("kind", BAD)
@fuzz(25)
@given(st.data(), GOODS, SEED)
def test_one_bad_ingredient_is_refused(kind, data, goods, seed):
    """Wherever it stands, and with any good ones."""
    bad = data.draw(BAD[kind])
    check_refused(*cooked([bad, *goods], seed))


@fuzz(150)
@given(TEXT, st.binary(max_size=20), st.booleans())
def test_a_file_that_is_not_toml_is_refused(text, content, is_text):
    """A line that begins with =, or a byte that UTF-8 does not have."""
    check_refused(["run", "--quiet"], f"= {text}".encode() if is_text else b"\xff" + content)


PROPER = "[run]\nexperts = 4\nplugins = ['z_loss']\nlr = 1e-3\ncapacity = 'none'\n[plugins.topk]\nrenorm = true\n"
EDIT = st.tuples(st.integers(0, len(PROPER)), st.sampled_from(["", *"[]{}='\"#.,\n_-+ exnit\\"]), st.integers(0, 3))


@fuzz(150)
@given(st.lists(EDIT, min_size=1, max_size=4), SEED)
@example([(0, "run = 3\n[plugins.run]\n#", len(PROPER))], 0)
@example([(0, f"[run]\nseed = {'9' * 5000}\n#", len(PROPER))], 0)
@example([(0, f"[run]\nplugins = {'[' * 5000}", len(PROPER))], 0)
def test_a_mistyped_file_is_accepted_or_refused(edits, seed):
    """A few keys hit wrongly: the file is still good, or it is bad input."""
    text = PROPER
    for place, typed, gone in edits:
        text = text[:place] + typed + text[place + gone :]
    code, err = outcome(["run", "--quiet", f"--seed={seed}"], text.encode())
    expected = (1, 1, True, True) if err == f"moe-engine: {ACCEPTED}\n" else (2, 1, True, False)
    assert expected == (code, *shape(err)), err


@fuzz(150)
@given(UNKNOWN | TEXT.map(lambda text: f"?{text}"), st.sampled_from(["plugins", "compare"]))
@example("x" * 300, "compare")
@example("", "compare")
@example("..", "compare")
def test_an_unknown_name_is_refused_by_every_command(name, command):
    """No such plugin, no such run."""
    check_refused([command, name])
