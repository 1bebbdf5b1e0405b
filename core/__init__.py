"""moe-engine: a minimal Mixture-of-Experts engine in which every strategy is a plugin.

The names below are public, as are those of `moe_engine.pages`, `moe_engine.tasks` and `moe_engine.testing`; plugins
need nothing else. Each name is imported on first use, so `moe-engine --help` and `moe-engine plugins` run without
importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.gallery import gallery_page as gallery_page
    from .analysis.usage import characteristic_tokens as characteristic_tokens
    from .contract.families import DENSE as DENSE
    from .contract.families import GATE as GATE
    from .contract.families import STACKED as STACKED
    from .contract.families import Block as Block
    from .contract.families import Dense as Dense
    from .contract.families import DenseBlock as DenseBlock
    from .contract.families import Family as Family
    from .contract.families import Stored as Stored
    from .contract.families import unwrapped as unwrapped
    from .contract.growth import Grown as Grown
    from .contract.growth import Growth as Growth
    from .contract.growth import HiddenUnits as HiddenUnits
    from .contract.growth import NewExpert as NewExpert
    from .contract.history import History as History
    from .contract.history import consecutive as consecutive
    from .contract.history import grow_at_peaks as grow_at_peaks
    from .contract.history import least_experts as least_experts
    from .contract.hookspecs import hookimpl as hookimpl
    from .contract.numerics import at_least_fp32 as at_least_fp32
    from .contract.numerics import centred_log as centred_log
    from .contract.numerics import count_by as count_by
    from .contract.numerics import cv2 as cv2
    from .contract.numerics import entropy_of as entropy_of
    from .contract.numerics import linear_cka as linear_cka
    from .contract.numerics import mutual_information as mutual_information
    from .contract.options import option as option
    from .contract.parts import Bias as Bias
    from .contract.parts import Experts as Experts
    from .contract.parts import GroupLimitedRouter as GroupLimitedRouter
    from .contract.parts import LinearRouter as LinearRouter
    from .contract.parts import Part as Part
    from .contract.parts import Router as Router
    from .contract.parts import RunningLoad as RunningLoad
    from .contract.parts import ema_update_ as ema_update_
    from .contract.parts import linear_logits as linear_logits
    from .contract.parts import ones as ones
    from .contract.parts import uniform as uniform
    from .contract.parts import zeros as zeros
    from .contract.protocols import Layer as Layer
    from .contract.protocols import LayerBuilder as LayerBuilder
    from .contract.routing import Assignments as Assignments
    from .contract.routing import Level as Level
    from .contract.routing import LevelSpec as LevelSpec
    from .contract.routing import Routing as Routing
    from .contract.routing import Slots as Slots
    from .contract.routing import Spec as Spec
    from .contract.routing import Tokens as Tokens
    from .contract.routing import assign as assign
    from .contract.routing import assign_where as assign_where
    from .contract.routing import causal_problem as causal_problem
    from .contract.routing import groups_problem as groups_problem
    from .contract.routing import keep_best_groups as keep_best_groups
    from .contract.stats import Effects as Effects
    from .contract.stats import Finding as Finding
    from .contract.stats import Stats as Stats
    from .contract.stats import Step as Step
    from .contract.stats import mean_of_pairs as mean_of_pairs
    from .contract.tasks import Task as Task
    from .contract.tasks import TaskSpec as TaskSpec
    from .contract.traits import Traits as Traits
    from .engine.engine import Engine as Engine
    from .engine.pruning import prune as prune
    from .errors import PluginError as PluginError
    from .errors import RunError as RunError
    from .errors import UsageError as UsageError
    from .errors import nearest as nearest
    from .files import safetensors_of as safetensors_of
    from .files import write_atomically as write_atomically
    from .growth.merging import merging as merging
    from .layer.activations import ACTIVATIONS as ACTIVATIONS
    from .layer.dense import DenseMLP as DenseMLP
    from .layer.experts import ModuleBank as ModuleBank
    from .layer.experts import StackedMLP as StackedMLP
    from .layer.grouped import grouped_conv as grouped_conv
    from .layer.grouped import grouped_linear as grouped_linear
    from .layer.grouped import own_values as own_values
    from .layer.grouped import row_counts as row_counts
    from .layer.moe import MoE as MoE
    from .layer.probing import evaluating as evaluating
    from .parallel.parallelize import expert_mesh as expert_mesh
    from .parallel.parallelize import parallelize as parallelize
    from .pretrained.adopting import adopt as adopt
    from .pretrained.adopting import release as release
    from .pretrained.exporting import export as export
    from .pretrained.language_models import PretrainedLM as PretrainedLM
    from .pretrained.language_models import train_only as train_only
    from .pretrained.training_memory import TrainingMemory as TrainingMemory
    from .pretrained.training_memory import training_memory as training_memory
    from .pretrained.upcycling import Upcycled as Upcycled
    from .pretrained.upcycling import upcycle as upcycle
    from .pretrained.watching import watch as watch
    from .processes import all_reduce_sum as all_reduce_sum
    from .processes import sum_over_ranks as sum_over_ranks
    from .run.checkpoints import load as load
    from .run.checkpoints import save as save
    from .run.page import run_page as run_page
    from .run.report_inputs import expert_loads as expert_loads
    from .run.report_inputs import run_figures as run_figures
    from .run.sample import Sample as Sample
    from .run.sample import SampledLayer as SampledLayer
    from .run.sample import read_sample as read_sample
    from .run.training import adam as adam
    from .seeds import generator as generator

_HOMES = {
    "analysis.gallery": ("gallery_page",),
    "analysis.usage": ("characteristic_tokens",),
    "contract.families": ("DENSE", "GATE", "STACKED", "Block", "Dense", "DenseBlock", "Family", "Stored", "unwrapped"),
    "contract.growth": ("Grown", "Growth", "HiddenUnits", "NewExpert"),
    "contract.history": ("History", "grow_at_peaks", "consecutive", "least_experts"),
    "contract.hookspecs": ("hookimpl",),
    "contract.numerics": (
        "at_least_fp32",
        "centred_log",
        "count_by",
        "cv2",
        "entropy_of",
        "linear_cka",
        "mutual_information",
    ),
    "contract.options": ("option",),
    "contract.parts": (
        "Bias",
        "Experts",
        "GroupLimitedRouter",
        "LinearRouter",
        "Part",
        "Router",
        "RunningLoad",
        "ema_update_",
        "linear_logits",
        "ones",
        "uniform",
        "zeros",
    ),
    "contract.protocols": ("Layer", "LayerBuilder"),
    "contract.routing": (
        "Assignments",
        "Level",
        "LevelSpec",
        "Routing",
        "Slots",
        "Spec",
        "Tokens",
        "assign",
        "assign_where",
        "causal_problem",
        "groups_problem",
        "keep_best_groups",
    ),
    "contract.stats": ("Effects", "Finding", "Stats", "Step", "mean_of_pairs"),
    "contract.traits": ("Traits",),
    "contract.tasks": ("Task", "TaskSpec"),
    "engine.engine": ("Engine",),
    "engine.pruning": ("prune",),
    "errors": ("PluginError", "RunError", "UsageError", "nearest"),
    "files": ("safetensors_of", "write_atomically"),
    "growth.merging": ("merging",),
    "layer.activations": ("ACTIVATIONS",),
    "layer.dense": ("DenseMLP",),
    "layer.experts": ("ModuleBank", "StackedMLP"),
    "layer.grouped": ("grouped_conv", "grouped_linear", "own_values", "row_counts"),
    "layer.moe": ("MoE",),
    "layer.probing": ("evaluating",),
    "parallel.parallelize": ("expert_mesh", "parallelize"),
    "pretrained.adopting": ("adopt", "release"),
    "pretrained.exporting": ("export",),
    "pretrained.language_models": ("PretrainedLM", "train_only"),
    "pretrained.training_memory": ("TrainingMemory", "training_memory"),
    "pretrained.upcycling": ("Upcycled", "upcycle"),
    "pretrained.watching": ("watch",),
    "processes": ("all_reduce_sum", "sum_over_ranks"),
    "run.checkpoints": ("load", "save"),
    "run.page": ("run_page",),
    "run.report_inputs": ("expert_loads", "run_figures"),
    "run.sample": ("Sample", "SampledLayer", "read_sample"),
    "run.training": ("adam",),
    "seeds": ("generator",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_engine' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
