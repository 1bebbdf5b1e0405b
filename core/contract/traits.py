"""What a plugin declares about itself besides its hooks: facts for other plugins and the core.

    @attrs.define(eq=False)
    class MyBias:
        traits = Traits(requires=("logits", "load"), effects=("equal_load",))

The core also reads three other names: the option `weight`, the coefficient of an auxiliary loss; the static method
`trial_options`, which configures a plugin for the conformance tests if its defaults can't run; and the method
`language_model` of a task, which rebuilds the model of a run.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from ..errors import UsageError, nearest

# what a router may provide, and any plugin require
ROUTER_TRAITS = {
    "logits": "raw logits",
    "probs": "a distribution over experts for each token",
    "load": "a load that training can shift between experts",
    "top_k": "the same number of choices for every token",
    "choices": "experts that each token chose, or was chosen by",
    "smooth_load": "a differentiable estimate of the load",
}
USUAL = ("logits", "probs", "load", "top_k", "choices")  # what a router provides unless it says otherwise

# effects that may conflict with another plugin, or that another plugin relies on
EFFECTS = {
    "equal_load": "makes all loads equal",
    "copies_router_row": "starts a new expert with its parent's router row",
    "copies_expert": "starts a new expert as an exact copy of its parent",
    "silent_start": "starts a new expert with an output of 0",
    "parts_copies": "sends different tokens to exact copies of an expert",
    "token_entropy": "moves the entropy of the choice",
    "mean_probs_cv2": "penalises the variance of the mean probabilities",
}

_NAMES = ("provides", "requires", "effects", "balanced", "orphans", "per_rank")
# class attributes of earlier versions, and what replaces each
RENAMED = {
    "gives": "traits = Traits(provides=...)",
    "needs": "traits = Traits(requires=...)",
    "balanced": "traits = Traits(balanced=...)",
    "orphans": "traits = Traits(orphans=True)",
    "parts_copies": 'traits = Traits(effects=("parts_copies",))',
}
# names that the core reads from a plugin besides hooks and options
DECLARED = ("traits", "weight", "trial_options", "language_model")


@attrs.frozen(init=False)
class Traits:
    """Facts about a plugin, in its class attribute `traits`. Raises UsageError for unknown ones.

    provides: keys of `ROUTER_TRAITS`, for a router; None means `USUAL`. requires: what the chosen router must
    provide. effects: keys of `EFFECTS`. balanced: a loss's value at perfect balance, None if it is not fixed.
    orphans: the trigger asks for new experts without a parent. per_rank: with several ranks, it works on each rank's
    tokens alone, so its result differs from one process's. A single word counts as a tuple of one.
    """

    provides: tuple[str, ...] | None
    requires: tuple[str, ...]
    effects: tuple[str, ...]
    balanced: float | None
    orphans: bool
    per_rank: bool

    def __init__(
        self,
        *,
        provides: str | Iterable[str] | None = None,
        requires: str | Iterable[str] = (),
        effects: str | Iterable[str] = (),
        balanced: float | None = None,
        orphans: bool = False,
        per_rank: bool = False,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise UsageError(f"Traits has no '{name}'; {nearest(name, _NAMES)}", code="unknown-trait")
        if balanced is not None and (isinstance(balanced, bool) or not isinstance(balanced, int | float)):
            raise UsageError(f"Traits: balanced is a number or None, not {balanced!r}", code="bad-trait")
        for name, value in (("orphans", orphans), ("per_rank", per_rank)):
            if not isinstance(value, bool):
                raise UsageError(f"Traits: {name} is True or False, not {value!r}", code="bad-trait")
        self.__attrs_init__(
            None if provides is None else _words("provides", provides, ROUTER_TRAITS),
            _words("requires", requires, ROUTER_TRAITS),
            _words("effects", effects, EFFECTS),
            balanced,
            orphans,
            per_rank,
        )


def _words(field: str, given: str | Iterable[str], known: Mapping[str, str]) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for word in words:
        if not isinstance(word, str):
            raise UsageError(f"Traits: {field} takes words, not {word!r}", code="bad-trait")
        if word not in known:
            raise UsageError(f"Traits: {field} has unknown '{word}'; {nearest(str(word), known)}", code="unknown-trait")
    return words


NONE = Traits()


def traits_of(plugin: Any) -> Traits:
    """The traits of a plugin, or of a plugin class."""
    traits: Traits = getattr(plugin, "traits", NONE)
    return traits


def provided_by(plugin: Any) -> tuple[str, ...]:
    """What a router provides."""
    provides = traits_of(plugin).provides
    return USUAL if provides is None else provides


def acts_on_tokens(hooks: Iterable[str]) -> bool:
    """Whether a plugin with these hooks computes from tokens, of one rank or of all."""
    return not {"moe_router", "moe_bias", "moe_aux_loss", "moe_measure"}.isdisjoint(hooks)


def weight_of(plugin: Any) -> float:
    """The coefficient of a plugin's auxiliary loss: its option `weight`, 1 if it has none."""
    return float(getattr(plugin, "weight", 1.0))


def trial_options_of(cls: type) -> Callable[[Path, int, int], Mapping[str, Any]] | None:
    """How the conformance tests configure a plugin: trial_options(folder, dim, hidden) -> options by name."""
    found: Callable[[Path, int, int], Mapping[str, Any]] | None = getattr(cls, "trial_options", None)
    return found


def problem_of(cls: type, hooks: Iterable[str]) -> str | None:
    """What is wrong with a plugin class's declarations, or None. hooks: the hooks that it implements."""
    names = [name for base in cls.__mro__[:-1] for name in vars(base)]
    for name in names:
        if name in RENAMED and name not in _options(cls):
            return f"'{name}' is now {RENAMED[name]}"
        near = _declared_like(name)
        if near and name not in DECLARED and not callable(getattr(cls, name, None)) and name not in _options(cls):
            known = "traits" if near[0] in RENAMED else near[0]
            return f"the core does not know the class attribute '{name}'; did you mean '{known}'?"
        if name != "traits" and isinstance(getattr(cls, name, None), Traits):
            return f"its traits are called '{name}'; call them 'traits'"
    traits = traits_of(cls)
    if not isinstance(traits, Traits):
        return f"'traits' is {traits!r}, not Traits(...)"
    if traits.provides is not None and "moe_router" not in hooks:
        return "only a router provides traits; use requires=... for what the plugin needs from a router"
    return None


@cache
def _declared_like(name: str) -> list[str]:
    return get_close_matches(name, (*DECLARED, *RENAMED), n=1, cutoff=0.8)


def _options(cls: type) -> set[str]:
    return {field.name for field in attrs.fields(cls)}
