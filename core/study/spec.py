"""A study as a TOML file says it: variants by crossing axes, columns, bars, pictures, and what was published."""

import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import cattrs

from ..contract.options import Settings
from ..errors import UsageError, listed, nearest
from ..registry import discovery
from ..registry.discovery import defaults
from .grid import Variant

At = dict[str, str]  # axis -> choice
OVER = ("each", "some", "mean", "interval", "within")
PICTURES = ("numbers", "usage", "over_time", "classes", "against")


@attrs.frozen
class Choice:
    """What one choice adds to a run: plugins, flags of the run by name, options by plugin."""

    plugins: tuple[str, ...] = ()
    run: dict[str, Any] = attrs.field(factory=dict)
    set: Settings = attrs.field(factory=dict)

    def __add__(self, other: "Choice") -> "Choice":
        options = {name: {**self.set.get(name, {}), **other.set.get(name, {})} for name in {**self.set, **other.set}}
        plugins = tuple(dict.fromkeys((*self.plugins, *other.plugins)))
        return Choice(plugins, {**self.run, **other.run}, options)


@attrs.frozen
class Part:
    """A table of a study: the product of the choices of its axes.

    cross: the choices by axis; an empty list is all. columns: quantities. seeds: unless the study's.
    add: what all of the part share beside the base. latency: time the trained models' inference.
    """

    name: str
    title: str
    cross: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    seeds: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(1)))
    add: Choice = Choice()
    latency: bool = False


@attrs.frozen
class Published:
    """A published row: shown above ours, never counted as ours. source: where it stands."""

    part: str
    name: str
    numbers: dict[str, float]
    source: str = ""


@attrs.frozen
class Bar:
    """What a study expects of a quantity.

    It must hold for every variant that `where` names (by "part" and axis). over: of the seeds' values, "each", "some"
    or the "mean" is held against the limit; "interval": the whole 95 % interval is; "within": it reaches
    the limit at least. against: choices by axis; the value is then the ratio (or, as = "difference", the
    difference, seed by seed) to the best of the variants that differ only there. One limit of at_least, at_most,
    above, below.
    """

    says: str
    quantity: str
    where: dict[str, tuple[str, ...]]
    against: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    compare: str = attrs.field(default="ratio", validator=attrs.validators.in_(("ratio", "difference")))
    over: str = attrs.field(default="each", validator=attrs.validators.in_(OVER))
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __attrs_post_init__(self) -> None:
        if len([one for one in (self.at_least, self.at_most, self.above, self.below) if one is not None]) != 1:
            raise ValueError(f"bar '{self.says}' needs one limit: at_least, at_most, above or below")


@attrs.frozen
class Picture:
    """A picture of the variants that `where` names.

    kind: numbers (columns beside each other), usage (bars of the test set's load), over_time (load over the first
    seed's run), classes (class by expert), against (a quantity over the choices of axis `x`, a line for each other).
    """

    name: str = attrs.field(validator=attrs.validators.matches_re(r"[\w-]+"))  # of its file
    title: str
    where: dict[str, tuple[str, ...]]
    kind: str = attrs.field(validator=attrs.validators.in_(PICTURES))
    quantities: tuple[str, ...] = ()
    x: str = ""


@attrs.frozen
class Quick:
    """What is different under --quick: fewer choices by axis, shorter runs; no bar is judged."""

    cross: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    parts: tuple[str, ...] = ()
    run: dict[str, Any] = attrs.field(factory=dict)
    set: Settings = attrs.field(factory=dict)


@attrs.frozen
class Study:
    """A whole study. notes: what is wrong with the publication, a sentence each. base: what all variants share."""

    name: str
    title: str
    question: str
    source: str
    part: tuple[Part, ...]
    axis: dict[str, dict[str, Choice]] = attrs.field(factory=dict)
    seeds: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    base: Choice = Choice()
    notes: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    bar: tuple[Bar, ...] = ()
    picture: tuple[Picture, ...] = ()
    quick: Quick = Quick()

    def shortened(self) -> "Study":
        """The study of --quick."""
        kept = [part for part in self.part if not self.quick.parts or part.name in self.quick.parts]
        parts = tuple(attrs.evolve(part, cross=_fewer(part.cross, self.quick.cross), seeds=None) for part in kept)
        last = Choice((), self.quick.run, self.quick.set)
        axes = {axis: {name: one + last for name, one in choices.items()} for axis, choices in self.axis.items()}
        title = f"{self.title} (quick form: short runs, to see that all works)"
        return attrs.evolve(
            self, title=title, part=parts, axis=axes, base=self.base + last, bar=(), published=(), seeds=1
        )

    def variants(self, flags: Mapping[str, Any]) -> Iterator[tuple[Part, At, Variant]]:
        """Every variant with its part and its place on the axes. flags: of the run, over what the file says."""
        for part in self.part:
            choices = [[(axis, name) for name in names or self.axis[axis]] for axis, names in part.cross.items()]
            for picked in product(*choices):
                whole = sum((self.axis[axis][name] for axis, name in picked), self.base + part.add)
                yield part, dict(picked), self._variant(part, ", ".join(name for _, name in picked), whole, flags)

    def _variant(self, part: Part, name: str, whole: Choice, flags: Mapping[str, Any]) -> Variant:
        run = {**whole.run, **flags}
        usual = defaults()
        own = {*whole.plugins, *usual["metrics"], usual["router"], usual["initializer"], run.get("task", usual["task"])}
        settings = {plugin: options for plugin, options in whole.set.items() if plugin in own}
        seeds = range(part.seeds) if part.seeds else None
        return Variant(f"{part.name}: {name}", whole.plugins, settings, run, seeds, part.latency)


def _fewer(cross: Mapping[str, tuple[str, ...]], only: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The choices that are also among `only`, of an axis that it names."""
    return {
        axis: tuple(name for name in (names or only.get(axis, ())) if name in only.get(axis, (name,)))
        for axis, names in cross.items()
    }


# -- reading ---------------------------------------------------------------------------------------


def shipped() -> dict[str, Traversable]:
    """The studies that come with the engine, by name."""
    files = resources.files("moe_engine.studies").iterdir()
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=str) if file.name.endswith(".toml")}


def read_study(name: str) -> Study:
    """The study of that name, or of that TOML file. Raises UsageError."""
    own = Path(name)
    source = own if name.endswith(".toml") else shipped().get(name)
    if source is None:
        raise UsageError(f"there is no study '{name}'; {nearest(name, shipped())}; a file of yours ends in .toml")
    try:
        tables = tomllib.loads(source.read_text("utf-8"))
        study = _converter().structure({"name": source.name.removesuffix(".toml"), **tables}, Study)
    except OSError as error:
        raise UsageError(f"study {name} can't be read: {error.strerror}") from error
    except cattrs.BaseValidationError as error:
        raise UsageError(f"study {name}: {cattrs.transform_error(error, 'study', _said)[0]}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"study {name} is not TOML: {error}") from error
    _check(study)
    return study


def _said(error: BaseException, kind: type | None) -> str:
    """What is wrong with a value: in the words of its own check, if it has one."""
    own = type(error) is ValueError and error.args
    return str(error.args[0]) if own else cattrs.v.format_exception(error, kind)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _words)
    return converter


def _words(value: Any, _: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{value!r} is no list of words")
    return tuple(value)


def _check(study: Study) -> None:
    """Raise UsageError for a name that is not there."""
    parts = [part.name for part in study.part]
    twice = [name for name in parts if parts.count(name) > 1]
    if twice or not parts:
        raise UsageError(
            f"study {study.name}: " + (f"two parts are called '{twice[0]}'" if twice else "it has no part")
        )
    for part in study.part:
        _known(study, f"part '{part.name}'", part.cross)
    for bar in study.bar:
        _known(study, f"bar '{bar.says}'", bar.where)
        _known(study, f"bar '{bar.says}'", bar.against)
    for picture in study.picture:
        x = {picture.x: ()} if picture.kind == "against" else {}
        _known(study, f"picture '{picture.name}'", {**picture.where, **x})
    for row in study.published:
        _known(study, f"published '{row.name}'", {"part": (row.part,)})
    wholes = [
        study.base,
        *(part.add for part in study.part),
        *(c for axis in study.axis.values() for c in axis.values()),
    ]
    installed = discovery.find()
    for plugin in [name for whole in wholes for name in (*whole.plugins, *whole.set)]:
        if plugin not in installed:
            raise UsageError(f"study {study.name}: there is no plugin '{plugin}'; {nearest(plugin, installed)}")


def _known(study: Study, who: str, names: Mapping[str, tuple[str, ...]]) -> None:
    axes = {"part": [part.name for part in study.part], **study.axis}
    for axis, choices in names.items():
        if axis not in axes:
            raise UsageError(f"study {study.name}, {who}: there is no axis '{axis}'; {nearest(axis, axes)}")
        for choice in choices:
            if choice not in axes[axis]:
                known = listed(map(repr, axes[axis]))
                raise UsageError(f"study {study.name}, {who}: '{choice}' is none of {axis}'s choices {known}")
