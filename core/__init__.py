"""moe-engine: a minimal Mixture-of-Experts engine in which every strategy is a plugin.

The names below are the public ones. They are imported on first use, so that the command line's
`--help` and `plugins` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import ACTIVATIONS as ACTIVATIONS
    from .checkpoints import load as load
    from .checkpoints import save as save
    from .dispatch import grouped_conv as grouped_conv
    from .dispatch import grouped_linear as grouped_linear
    from .dispatch import own_values as own_values
    from .dispatch import row_counts as row_counts
    from .effects import Effects as Effects
    from .effects import evaluating as evaluating
    from .engine import Engine as Engine
    from .errors import PluginError as PluginError
    from .errors import RunError as RunError
    from .errors import UsageError as UsageError
    from .experts import ModuleBank as ModuleBank
    from .experts import StackedMLP as StackedMLP
    from .growth import Grown as Grown
    from .growth import Growth as Growth
    from .growth import NewExpert as NewExpert
    from .hookspecs import hookimpl as hookimpl
    from .layer import MoE as MoE
    from .options import option as option
    from .parts import Bias as Bias
    from .parts import Experts as Experts
    from .parts import GroupLimitedRouter as GroupLimitedRouter
    from .parts import LinearRouter as LinearRouter
    from .parts import Part as Part
    from .parts import Router as Router
    from .parts import RunningLoad as RunningLoad
    from .parts import follow as follow
    from .parts import linear_logits as linear_logits
    from .parts import ones as ones
    from .parts import uniform as uniform
    from .parts import zeros as zeros
    from .processes import over_processes as over_processes
    from .processes import shared as shared
    from .routing import Assignments as Assignments
    from .routing import Level as Level
    from .routing import LevelSpec as LevelSpec
    from .routing import Routing as Routing
    from .routing import Slots as Slots
    from .routing import Spec as Spec
    from .routing import Tokens as Tokens
    from .routing import assign as assign
    from .routing import assign_where as assign_where
    from .routing import at_least_fp32 as at_least_fp32
    from .routing import causal_problem as causal_problem
    from .routing import centred_log as centred_log
    from .routing import count_by as count_by
    from .routing import cv2 as cv2
    from .routing import entropy_of as entropy_of
    from .routing import groups_problem as groups_problem
    from .routing import keep_best_groups as keep_best_groups
    from .stats import Finding as Finding
    from .stats import Stats as Stats
    from .stats import Step as Step
    from .stats import mean_of_pairs as mean_of_pairs
    from .tasks import Task as Task
    from .tasks import TaskSpec as TaskSpec
    from .training import adam as adam
    from .triggers import History as History
    from .triggers import children_of_peaks as children_of_peaks
    from .triggers import lasting as lasting

_HOMES = {
    "checkpoints": ("load", "save"),
    "dispatch": ("grouped_conv", "grouped_linear", "own_values", "row_counts"),
    "effects": ("Effects", "evaluating"),
    "engine": ("Engine",),
    "errors": ("PluginError", "RunError", "UsageError"),
    "activations": ("ACTIVATIONS",),
    "experts": ("ModuleBank", "StackedMLP"),
    "growth": ("Grown", "Growth", "NewExpert"),
    "hookspecs": ("hookimpl",),
    "layer": ("MoE",),
    "options": ("option",),
    "parts": (
        *("Bias", "Experts", "GroupLimitedRouter", "LinearRouter", "Part", "Router", "RunningLoad"),
        *("follow", "linear_logits", "ones", "uniform", "zeros"),
    ),
    "processes": ("over_processes", "shared"),
    "routing": (
        *("Assignments", "Level", "LevelSpec", "Routing", "Slots", "Spec", "Tokens"),
        *("assign", "assign_where", "at_least_fp32", "causal_problem", "centred_log", "count_by", "cv2", "entropy_of"),
        *("groups_problem", "keep_best_groups"),
    ),
    "stats": ("Finding", "Stats", "Step", "mean_of_pairs"),
    "tasks": ("Task", "TaskSpec"),
    "training": ("adam",),
    "triggers": ("History", "children_of_peaks", "lasting"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_engine' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
