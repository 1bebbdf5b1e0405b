"""moe-engine: a minimal Mixture-of-Experts engine in which every strategy is a plugin.

The names below are the public ones. They are imported on first use, so that the command line's
`--help` and `plugins` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Effects, Engine
    from .errors import PluginError, RunError, UsageError
    from .experts import ModuleBank, StackedMLP
    from .hookspecs import hookimpl
    from .layer import MoE
    from .options import option
    from .parts import Bias, Experts, LinearRouter, Part, Router, linear_logits, uniform
    from .routing import (
        Assignments,
        Level,
        LevelSpec,
        Routing,
        Spec,
        Tokens,
        assign,
        centred_log,
        count_by,
        groups_problem,
        keep_best_groups,
    )
    from .stats import Finding, Stats, Step
    from .tasks import Task, TaskSpec
    from .training import adam

_HOMES = {
    "engine": ("Effects", "Engine"),
    "errors": ("PluginError", "RunError", "UsageError"),
    "experts": ("ModuleBank", "StackedMLP"),
    "hookspecs": ("hookimpl",),
    "layer": ("MoE",),
    "options": ("option",),
    "parts": ("Bias", "Experts", "LinearRouter", "Part", "Router", "linear_logits", "uniform"),
    "routing": (
        *("Assignments", "Level", "LevelSpec", "Routing", "Spec", "Tokens"),
        *("assign", "centred_log", "count_by", "groups_problem", "keep_best_groups"),
    ),
    "stats": ("Finding", "Stats", "Step"),
    "tasks": ("Task", "TaskSpec"),
    "training": ("adam",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_engine' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
