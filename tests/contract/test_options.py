"""Options: what a user typed becomes exactly what was meant, or an error that says what is wrong."""

import math

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine import UsageError, option
from moe_engine.contract.options import build, changed, options_of, parse_settings, values_of


@attrs.define(eq=False)
class Sample:
    """One option of each type."""

    flag: bool = option(False, help="a switch")
    count: int = option(3, help="a count", min=1, max=9)
    rate: float = option(0.5, help="a rate", min=0, max=1)
    any_rate: float = option(0.0, help="a number without limits")
    word: str = option("log", help="a word", choices=("log", "linear"))
    names: tuple[str, ...] = option((), help="several words")
    maybe_flag: bool | None = option(None, help="a switch that may be unset")
    maybe_count: int | None = option(None, help="a count that may be unset", min=1)
    maybe_word: str | None = option(None, help="a word that may be unset", choices=("a", "b"))
    zeros: int = attrs.field(default=0, init=False)


TITLE = "loss 'sample'"
YES, NO = ("true", "yes", "on", "1", "TRUE", " On "), ("false", "no", "off", "0", "False", " No ")


def made(**given):
    """A sample with some options set."""
    return build(Sample, TITLE, given)


def error_of(**given):
    """The sentence with which the settings are refused."""
    with pytest.raises(UsageError) as caught:
        made(**given)
    return str(caught.value)


GOOD = [
    *[("flag", given, True) for given in (*YES, True, 1)],
    *[("flag", given, False) for given in (*NO, False, 0)],
    *[("maybe_flag", given, expected) for given, expected in (("false", False), ("none", None), (None, None))],
    *[("count", given, expected) for given, expected in ((1, 1), ("9", 9), (" 4 ", 4))],
    *[("maybe_count", given, expected) for given, expected in (("+2", 2), ("None", None))],
    *[("rate", given, expected) for given, expected in ((1, 1.0), ("0", 0.0), ("1e-3", 0.001))],
    *[("any_rate", given, expected) for given, expected in (("-2.5", -2.5), (-3, -3.0))],
    *[("maybe_word", given, expected) for given, expected in (("b", "b"), ("none", None), (" NONE ", None))],
    *[("names", given, expected) for given, expected in (([], ()), (["b", "a"], ("b", "a")), (("a",), ("a",)))],
    ("word", "linear", "linear"),
]


@pytest.mark.parametrize(("name", "given", "expected"), GOOD)
def test_a_value_of_the_right_kind_is_taken_as_meant(name, given, expected):
    """Texts, as of --set, and TOML's own values give the same value of the same type."""
    actual = getattr(made(**{name: given}), name)
    assert (type(expected), expected) == (type(actual), actual)


WRONG = [
    *[("flag", given) for given in ("maybe", "", "2", "truee", "none", None, 2, 1.0, [True], {})],
    *[("count", given) for given in ("1.7", "1.0", "1e0", "", "three", "nan", "none", None)],
    *[("count", given) for given in (1.0, 1.7, True, False, [1], {}, b"1")],
    *[("rate", given) for given in ("half", "", "1/2", "0,5", "true", "none", None, True, False, [0.5], {})],
    *[("any_rate", given) for given in ("nan", "-nan", "inf", "-inf", "Infinity", "1e400")],
    *[("any_rate", given) for given in (math.nan, math.inf, -math.inf)],
    *[("word", given) for given in (1, 1.5, True, None, ["log"], {})],
    *[("names", given) for given in ("a,b", "a", 1, [1], ["a", 1], [["a"]], {"a": 1}, None)],
    *[("maybe_flag", given) for given in ("maybe", "nil", "null", "", 2, [None])],
    *[("maybe_count", given) for given in ("nan", "", "null", 1.5, True, [None])],
]
KIND = {
    "flag": "true or false",
    "count": "a whole number",
    "rate": "a number",
    "any_rate": "a number",
    "word": "a word",
    "names": "a list of words",
    "maybe_flag": "true or false or none",
    "maybe_count": "a whole number or none",
}


@pytest.mark.parametrize(("name", "given"), WRONG)
def test_a_value_of_another_kind_is_refused_with_the_kind_in_words(name, given):
    """Nothing is guessed: the option, its kind and the value are in the sentence."""
    expected = f"{TITLE}: option '{name}' is {KIND[name]}; {given!r} is not"
    assert expected == error_of(**{name: given})


@pytest.mark.parametrize("name", ["rate", "any_rate"])
def test_a_whole_number_that_no_float_can_hold_is_refused(name):
    """10^400 is a whole number in TOML, and over the range of a float."""
    expected = f"{TITLE}: option '{name}' is a number; {10**400} is not"
    assert expected == error_of(**{name: 10**400})


def test_digits_past_the_limit_of_python_are_refused():
    """Python reads whole numbers of at most 4300 digits."""
    expected = f"{TITLE}: option 'count' is a whole number; '{'9' * 5000}' is not"
    assert expected == error_of(count="9" * 5000)


BEYOND = [
    ("count", 0, "'count' must be >= 1: 0"),
    ("count", "-1", "'count' must be >= 1: -1"),
    ("count", 10, "'count' must be <= 9: 10"),
    ("rate", -1e-9, "'rate' must be >= 0: -1e-09"),
    ("rate", "1.5", "'rate' must be <= 1: 1.5"),
    ("maybe_count", 0, "'maybe_count' must be >= 1: 0"),
]
BOUNDS = [("count", 1), ("count", 9), ("rate", 0.0), ("rate", 1.0), ("maybe_count", 1)]


@pytest.mark.parametrize(("name", "given", "expected"), BEYOND)
def test_a_value_beyond_a_bound_is_refused_with_the_bound(name, given, expected):
    """The sentence names the option, the bound and the value."""
    assert f"{TITLE}: {expected}" == error_of(**{name: given})


@pytest.mark.parametrize(("name", "given"), BOUNDS)
def test_a_bound_itself_is_allowed(name, given):
    """min and max are inclusive."""
    assert given == getattr(made(**{name: given}), name)


@pytest.mark.parametrize("name", ["maybe_count", "maybe_word", "maybe_flag"])
def test_limits_do_not_apply_to_none(name):
    """Unset is always within the bounds and among the choices."""
    assert getattr(made(**{name: "none"}), name) is None


@pytest.mark.parametrize(("name", "choices"), [("word", ("log", "linear")), ("maybe_word", ("a", "b"))])
@pytest.mark.parametrize("given", ["lin", "", "LOG", "a b"])
def test_a_word_that_is_no_choice_is_refused_with_the_choices(name, choices, given):
    """All choices are in the sentence, and the word that was given."""
    expected = f"{TITLE}: '{name}' must be in {choices!r} (got {given!r})"
    assert expected == error_of(**{name: given})


@attrs.define(eq=False)
class Impossible:
    """Its default breaks its own bound."""

    count: int = option(5, help="too many", max=3)


def test_a_default_is_held_against_the_limits_too():
    """A plugin whose author mistyped a default says so when it is built."""
    with pytest.raises(UsageError, match=r"^loss 'impossible': 'count' must be <= 3: 5$"):
        build(Impossible, "loss 'impossible'", {})


ALL = "choose from any_rate, count, flag, maybe_count, maybe_flag, maybe_word, names, rate and word"
SUGGESTED = [
    ("nams", "did you mean 'names'?"),
    ("rate_", "did you mean 'rate' or 'any_rate'?"),
    ("zeros", ALL),
    ("qqq", ALL),
]


@pytest.mark.parametrize(("name", "advice"), SUGGESTED)
def test_an_unknown_option_is_refused_with_what_was_meant(name, advice):
    """The nearest names, or all there are; a field that is no option does not count."""
    assert f"{TITLE} has no option '{name}'; {advice}" == error_of(**{name: 1})


def test_the_first_wrong_option_is_the_one_reported():
    """One sentence, about one option."""
    expected = [f"{TITLE} has no option 'qqq'; {ALL}", f"{TITLE}: option 'count' is a whole number; 'x' is not"]
    assert expected == [error_of(qqq=1, count="x"), error_of(count="x", qqq=1)]


def test_options_come_in_the_order_of_the_source():
    """A list of options reads as the plugin's file does."""
    expected = [*KIND, "maybe_word"]
    assert expected == list(options_of(Sample))


def test_an_option_tells_its_type_limits_default_and_help():
    """What `plugins NAME` shows."""
    expected = ("count", "a whole number", 3, "a count", 1, 9, None)
    assert expected == attrs.astuple(options_of(Sample)["count"])


def test_choices_are_told_as_a_tuple():
    """In the order in which the author listed them."""
    expected = ("a word or none", ("a", "b"))
    told = options_of(Sample)["maybe_word"]
    assert expected == (told.type, told.choices)


def test_values_are_the_options_as_set_and_nothing_else():
    """Defaults and given ones alike; a field that is no option is left out."""
    expected = {name: one.default for name, one in options_of(Sample).items()} | {"count": 7}
    assert expected == values_of(made(count="7"))


def test_without_settings_every_option_has_its_default():
    """`build` of nothing is the plugin as its author wrote it."""
    expected = {name: one.default for name, one in options_of(Sample).items()}
    assert expected == values_of(made())


def test_changed_changes_a_copy():
    """The copy has the new value and keeps the others; the original stays as it was."""
    original = made(count=2, rate="0.25")
    copy = changed(original, TITLE, {"rate": "0.75"})
    expected = [(2, 0.25), (2, 0.75)]
    assert expected == [(one.count, one.rate) for one in (original, copy)]


def test_changed_by_nothing_is_equal_but_another_object():
    """A layer with settings of its own never shares its plugin."""
    original = made(count=2)
    copy = changed(original, TITLE, {})
    assert copy is not original
    assert values_of(original) == values_of(copy)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rate": "x"}, "option 'rate' is a number; 'x' is not"),
        ({"rate": 2}, "'rate' must be <= 1: 2.0"),
        ({"word": "cubic"}, "'word' must be in ('log', 'linear') (got 'cubic')"),
    ],
)
def test_changed_checks_as_build_does(given, expected):
    """Types, bounds and choices hold for one layer's settings too."""
    with pytest.raises(UsageError) as caught:
        changed(made(), TITLE, given)
    assert f"{TITLE}: {expected}" == str(caught.value)


def test_changed_refuses_an_unknown_option():
    """With the nearest name, as everywhere."""
    with pytest.raises(UsageError, match=r"^loss 'sample' has no option 'cont'; did you mean 'count'\?$"):
        changed(made(), TITLE, {"cont": 1})


PARSED = [
    ([], {}),
    (["a.b=1"], {"a": {"b": "1"}}),
    (["a.b=1", "a.c=2", "d.b=3"], {"a": {"b": "1", "c": "2"}, "d": {"b": "3"}}),
    (["a.b=1", "a.b=2"], {"a": {"b": "2"}}),
    (["a.b=x=y"], {"a": {"b": "x=y"}}),
    (["a.b="], {"a": {"b": ""}}),
    ([" a.b = 1 "], {"a": {"b": "1"}}),
    (["a.b=1.5"], {"a": {"b": "1.5"}}),
]


@pytest.mark.parametrize(("texts", "expected"), PARSED)
def test_settings_are_nested_by_plugin_and_option(texts, expected):
    """The last of two equal names wins; everything after the first = is the value."""
    assert expected == parse_settings(texts)


@pytest.mark.parametrize("text", ["", "=", ".", ".=", "a", "a.b", "a=1", "a.=1", ".b=1", "=a.b", "a=b.c", " . = "])
def test_a_setting_of_another_form_is_refused(text):
    """The sentence repeats the text, and shows the form."""
    with pytest.raises(UsageError) as caught:
        parse_settings(["a.b=1", text])
    assert f"setting '{text}' is not of the form plugin.option=value" == str(caught.value)


def annotated(text):
    """A plugin with one option `count`, its type as a text: what `from __future__ import annotations` makes of it."""
    body = {"__annotations__": {"count": text}, "__module__": __name__, "count": option(1, help="a count")}
    return attrs.define(eq=False)(type("Annotated", (), body))


def test_a_type_that_is_a_text_is_read():
    """A plugin's file may begin with `from __future__ import annotations`."""
    expected = 4
    assert expected == build(annotated("int | None"), TITLE, {"count": "4"}).count


@pytest.mark.parametrize("use", [options_of, lambda cls: build(cls, TITLE, {})], ids=["options_of", "build"])
def test_a_type_that_does_not_exist_is_a_usage_error(use):
    """A plugin's wrong annotation is that plugin's error, not a crash of the command."""
    with pytest.raises(UsageError, match="Nowhere"):
        use(annotated("Nowhere"))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_survives_its_text(number):
    """`--set` of a printed number gives that number, bit for bit."""
    assert number.hex() == made(any_rate=repr(number)).any_rate.hex()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(min_value=1))
def test_every_whole_number_survives_its_text(number):
    """Whole numbers are never rounded through a float."""
    assert number == made(maybe_count=str(number)).maybe_count


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.floats().filter(lambda number: not 0 <= number <= 1))
def test_no_number_outside_its_bounds_is_taken(number):
    """NaN and the infinities are outside of every bound."""
    assert "'rate'" in error_of(rate=number)
