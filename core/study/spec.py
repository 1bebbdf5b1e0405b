"""A study as records: variants from crossed axes, criteria, figures."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import attrs

from ..contract.options import Settings
from ..registry.discovery import defaults
from .grid import StudyVariant

At = dict[str, str]  # axis -> choice
OVER = ("each", "some", "mean", "interval", "within")
FIGURES = ("numbers", "usage", "over_time", "classes", "against")


@attrs.frozen
class Choice:
    """What a choice on an axis adds to a run: plugins, run flags by name, options by plugin."""

    plugins: tuple[str, ...] = ()
    run: dict[str, Any] = attrs.field(factory=dict)
    set: Settings = attrs.field(factory=dict)

    def __add__(self, other: "Choice") -> "Choice":
        options = {name: {**self.set.get(name, {}), **other.set.get(name, {})} for name in {**self.set, **other.set}}
        plugins = tuple(dict.fromkeys((*self.plugins, *other.plugins)))
        return Choice(plugins, {**self.run, **other.run}, options)


@attrs.frozen
class StudyPart:
    """A table of a study: all combinations of the choices on its axes.

    name: empty if the study has no other part. cross: the choices by axis; an empty list means all. columns:
    quantities. seeds: how many, instead of the study's. add: what this part adds to the base. latency: also time the
    trained models' inference.
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
    """A published row, shown above the measured ones and never mixed with them.

    source: where it was published. at: its choices by axis, where figures show it.
    """

    part: str
    name: str
    numbers: dict[str, float]
    source: str = ""
    at: At = attrs.field(factory=dict)


@attrs.frozen
class Criterion:
    """A claim about a quantity, with the limit that decides it.

    Every variant that `where` names (by "part" and axis) must meet it. over: what is compared with the limit: each
    seed's value, that of some seed, their mean, both ends of the 95 % interval ("interval") or either end ("within").
    against: choices by axis; the value is then the ratio (or, with compare = "difference", the difference, seed by
    seed) to the best of the variants that differ only there. Exactly one limit: at_least, at_most, above or below.
    """

    claim: str
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
        if [self.at_least, self.at_most, self.above, self.below].count(None) != 3:
            raise ValueError(f"criterion '{self.claim}' needs one limit: at_least, at_most, above or below")


@attrs.frozen
class FigureSpec:
    """A figure of the variants that `where` names.

    kind: numbers (quantities next to each other), usage (bars of the test set's load), over_time (load over the first
    seed's run), classes (class by expert), against (a quantity over the choices of axis `x`, one line for each
    combination of the others). lines: variants that numbers and against draw as lines across, such as a dense model.
    """

    name: str = attrs.field(validator=attrs.validators.matches_re(r"[\w-]+"))  # of its file
    title: str
    where: dict[str, tuple[str, ...]]
    kind: str = attrs.field(validator=attrs.validators.in_(FIGURES))
    quantities: tuple[str, ...] = ()
    x: str = ""
    lines: dict[str, tuple[str, ...]] = attrs.field(factory=dict)


@attrs.frozen
class Quick:
    """What --quick changes: fewer choices per axis, shorter runs. Criteria are not judged.

    data: what it trains on. title, titles, figures: of the study, its parts and its figures, where theirs are true of
    the whole study alone.
    """

    data: str = ""
    title: str = ""
    titles: dict[str, str] = attrs.field(factory=dict)
    figures: dict[str, str] = attrs.field(factory=dict)
    cross: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    parts: tuple[str, ...] = ()
    run: dict[str, Any] = attrs.field(factory=dict)
    set: Settings = attrs.field(factory=dict)


@attrs.frozen
class Study:
    """A whole study. notes: errors in the publication, one sentence each. base: what all variants share."""

    name: str
    title: str
    question: str
    source: str
    part: tuple[StudyPart, ...]
    axis: dict[str, dict[str, Choice]] = attrs.field(factory=dict)
    seeds: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    base: Choice = Choice()
    notes: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    criterion: tuple[Criterion, ...] = ()
    figure: tuple[FigureSpec, ...] = ()
    quick: Quick = Quick()

    def shortened(self) -> "Study":
        """The study that --quick runs."""
        kept = [part for part in self.part if not self.quick.parts or part.name in self.quick.parts]
        parts = tuple(
            attrs.evolve(
                part,
                title=self.quick.titles.get(part.name, part.title),
                cross=_fewer(part.cross, self.quick.cross),
                seeds=None,
            )
            for part in kept
        )
        figures = [attrs.evolve(one, title=self.quick.figures.get(one.name, one.title)) for one in self.figure]
        last = Choice((), self.quick.run, self.quick.set)
        axes = {axis: {name: choice + last for name, choice in choices.items()} for axis, choices in self.axis.items()}
        on = f" on {self.quick.data}" if self.quick.data else ""
        title = f"{self.quick.title or self.title} (quick: short runs{on}, to check that everything works)"
        shorter = attrs.evolve(self, title=title, part=parts, axis=axes, base=self.base + last, seeds=1)
        return attrs.evolve(shorter, figure=tuple(figures), published=(), criterion=())

    def variants(self, flags: Mapping[str, Any]) -> Iterator["Planned"]:
        """Every variant with its part and its choice on each axis. flags: of the run; they override the file's."""
        for part in self.part:
            choices = [[(axis, name) for name in names or self.axis[axis]] for axis, names in part.cross.items()]
            for chosen in product(*choices):
                whole = sum((self.axis[axis][name] for axis, name in chosen), self.base + part.add)
                name = full_name(part.name, ", ".join(name for _, name in chosen))
                yield part, dict(chosen), self._variant(part, name, whole, flags)

    def _variant(self, part: StudyPart, name: str, whole: Choice, flags: Mapping[str, Any]) -> StudyVariant:
        run = {**whole.run, **flags}
        usual = defaults()
        active = {*whole.plugins, *usual["metrics"], usual["router"], usual["initializer"]}
        active.add(run.get("task", usual["task"]))
        settings = {plugin: options for plugin, options in whole.set.items() if plugin in active}
        seeds = range(part.seeds) if part.seeds else None
        return StudyVariant(name, whole.plugins, settings, run, seeds, part.latency)


Planned = tuple[StudyPart, At, StudyVariant]


def full_name(part: str, variant: str) -> str:
    """A variant's name within its study."""
    return f"{part}: {variant}" if part else variant


def matches(row: Mapping[str, Any], where: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a row of a study's results has one of these choices on each axis; "part" counts as an axis."""
    place = {"part": row["part"], **row["at"]}
    return all(place.get(axis) in choices for axis, choices in where.items())


def _fewer(cross: Mapping[str, tuple[str, ...]], only: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The choices, restricted to those in `only` on the axes that it names."""
    return {
        axis: tuple(name for name in (names or only.get(axis, ())) if name in only.get(axis, (name,)))
        for axis, names in cross.items()
    }
