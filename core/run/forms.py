"""Forms of numbers: the same quantity has the same unit and digits in tables, lines, reports and figures."""

from typing import Any, NamedTuple


class Format(NamedTuple):
    """A quantity's format: title, factor to the title's unit, digits after the point."""

    title: str
    factor: float = 1
    digits: int = 3


PERCENT = 100
FORMATS = {  # by name; all others have three digits
    **{name: Format(f"{name} %", PERCENT, 2) for name in ("accuracy", "precision", "recall")},
    **{name: Format(f"{name} %", PERCENT, 2) for name in ("agreement", "first")},
    "f1": Format("F1 %", PERCENT, 2),
    "total_variation": Format("moved %", PERCENT, 2),
    "loss": Format("loss", 1, 4),
    "perplexity": Format("perplexity", 1, 2),
    "active": Format("active", 1, 1),
    "active_1pct": Format("active (1 %)", 1, 1),
    "top_share": Format("top share %", PERCENT, 1),
    "dropped": Format("dropped %", PERCENT, 1),
    "train_dropped": Format("dropped %", PERCENT, 1),
    "learning_rate": Format("learning rate", 1, 6),
    "seconds": Format("seconds", 1, 0),
    "parameters": Format("parameters (M)", 1e-6, 2),
    "active_parameters": Format("active parameters (M)", 1e-6, 2),
    "flops.active": Format("MFLOPs", 1e-6, 2),
    "flops.total": Format("MFLOPs, all experts", 1e-6, 2),
    "model.active": Format("model MFLOPs", 1e-6, 1),
    "model.total": Format("model MFLOPs, all experts", 1e-6, 1),
    "model.parameters": Format("parameters (M)", 1e-6, 2),
    "model.active_parameters": Format("active (M)", 1e-6, 2),
    "step_seconds": Format("step ms", 1000, 2),
    "step_ratio": Format("step/dense", 1, 2),
    "summary.seconds": Format("seconds", 1, 0),
    "latency.median": Format("inference ms", 1000, 2),
    "latency.p95": Format("inference p95 ms", 1000, 2),
    "latency.throughput": Format("samples/s", 1, 0),
}

MEANINGS = {  # on hover
    "active": "experts with at least a tenth of the mean load",
    "cv": "standard deviation of the experts' loads over their mean; 0: even",
    "gini": "Gini coefficient of the loads; 0: even",
    "entropy": "of the loads, over that of even ones; 1: even",
    "max_min": "largest load over smallest; 1: even",
    "maxvio": "largest load over the mean, minus 1; 0: even",
    "dropped": "choices beyond the capacity",
    "mutual_information": "between class and expert; 0: independent, 1: one tells the other",
}

COUNTS = ("active", "capacity")  # a whole one is shown as such; the mean over layers may not be


def fixed(value: float, digits: int) -> str:
    """A number with that many digits after the point; with two significant ones where those would all be 0."""
    text = f"{value:,.{digits}f}"
    return f"{value:.1e}" if value and not text.strip("-0.,") else text


def heading(name: str) -> str:
    """The title of a column, with its unit."""
    return FORMATS[name].title if name in FORMATS else name.replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value as it stands under its `heading`: "-" for None, whole numbers and words as they are."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name in COUNTS and value == int(value):
        return f"{value:.0f}"
    form = FORMATS.get(name, Format(name))
    digits = 0 if form.factor * abs(value) >= 1000 else form.digits
    return fixed(form.factor * value, digits)


def percent(value: float) -> str:
    """A share in a sentence: 98.05%."""
    return f"{fixed(PERCENT * value, 2)}%"
