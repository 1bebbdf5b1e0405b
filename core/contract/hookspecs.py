"""The hooks: everything that a plugin may implement.

A plugin is a class decorated with `@attrs.define(eq=False)`. Its fields made with `option(...)` are its options, its
docstring is its help, its methods marked `@hookimpl` implement hooks, and its class attribute `traits` states
facts about it. An implementation names only the arguments that it needs. Plugins run in the order in which they
were typed. Hooks are called when a layer is built and around a step; only `moe_aux_loss` and `moe_measure` are
called in a forward, as plain bound methods.

Shapes: T tokens, D model, H hidden, E experts, K chosen per token, N assignments, n units of a level.
"""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Generator, Tensor, nn

    from .families import Family
    from .growth import Growth, NewExpert
    from .history import History
    from .parts import Bias, Experts, Part, Router
    from .protocols import Layer
    from .routing import LevelSpec, Routing, Spec
    from .run import Run
    from .setup import Setup
    from .stats import Effects, Finding, Stats
    from .tasks import Task, TaskSpec

hookspec = pluggy.HookspecMarker("moe_engine")
hookimpl = pluggy.HookimplMarker("moe_engine")


@hookspec
def moe_router(spec: "Spec") -> "Router":  # type: ignore[empty-body]
    """Return the router of a layer that is being built.

    Exactly one of the chosen plugins implements this hook. `spec` holds the layer's sizes: dim, hidden, experts,
    top_k and so on.
    """


@hookspec
def moe_bias(spec: "Spec", level: "LevelSpec") -> "Bias | None":
    """Return a bias for one level of a layer's router, or None.

    Called while a layer is built, once for each level (`level` has name, size, top_k and limited). The biases of
    all plugins are added up in the order typed.
    """


@hookspec
def moe_experts(spec: "Spec") -> "Experts | None":
    """Return the bank of experts of a layer that is being built, or None.

    At most one chosen plugin may return a bank for a layer; without one the layer has a stacked MLP.
    """


@hookspec
def moe_state(spec: "Spec") -> "Part | None":
    """Return this plugin's state in a layer that is being built, or None.

    Each plugin gets its state back as the argument `state` of later hooks. The state's tensors are saved with the
    layer, and its `after_step(step)` is called once per optimizer step.
    """


@hookspec
def moe_aux_loss(routing: "Routing", layer: "Layer", state: "Part | None") -> "Tensor | Mapping[str, Tensor]":  # type: ignore[empty-body]
    """Return an auxiliary loss of one training forward: a scalar, or scalars by name.

    Return it unweighted and attached to the graph; the core multiplies it by the plugin's option `weight`, averages
    over layers and injects the gradient.
    """


@hookspec
def moe_measure(routing: "Routing", layer: "Layer", state: "Part | None") -> "Mapping[str, Tensor]":  # type: ignore[empty-body]
    """Return tensors by name, to be summed over forwards and processes.

    Called in each forward. In training the tensors pass through the ledger, so a recomputed forward counts once. Names
    and shapes must be the same in every forward. The sums are available as `stats["PLUGIN.NAME"]`.
    """


@hookspec
def moe_metrics(  # type: ignore[empty-body]
    stats: "Stats",
    layer: "Layer",
    effects: "Effects | None",
    probe: "Routing | None",
    memory: "dict[str, Any]",
) -> "Mapping[str, float | Tensor | Finding]":
    """Return metrics, arrays or findings by name, for one layer at a log point.

    `stats` holds the sums since the last log point (training) or over a data set (evaluation), always of at least
    one token: a layer without data is skipped. `effects` says how strongly each loss term and each bias moves the
    router, `probe` is the layer's routing of a fixed held-out batch; both are computed only if an implementation
    names them, and are None if there is no such batch. `memory` belongs to this plugin, layer and split (training
    or evaluation): tensors and plain values by name, empty at first and after the layer grew, saved in checkpoints.
    Two plugins that return the same name are an error.
    """


@hookspec
def moe_growth(history: "History", memory: "dict[str, float]") -> "Growth | Sequence[Growth] | None":
    """Return the growth that should happen now, several growths (of different layers), or None.

    Called after each optimizer step; a trigger decides how often to act. `history` has step, loss, eval_loss,
    layers, growths, since_growth, load(layer), busiest(layer) and state(layer), this plugin's state in that layer.
    `memory` belongs to this plugin: numbers by name, empty at first, saved in checkpoints; state kept anywhere else
    is lost when a run resumes. All triggers are called, and the first growth in the order typed is carried out.
    All processes must return the same; `history` is the same in each of them.
    """


@hookspec(firstresult=True)
def moe_new_expert(
    parent: "Mapping[str, Tensor] | None",
    growth: "Growth",
    index: int,
    fresh: "Mapping[str, Tensor]",
    roles: "Mapping[str, str]",
    generator: "Generator",
    inputs: "Tensor | None",
) -> "NewExpert | None":
    """Return the weights of an expert that is being added, or None.

    Rows are one expert's tensors by "part.tensor", copied to the CPU. `parent`: the rows of the expert that the new
    one descends from, if any, including changes by earlier new experts of this growth. `fresh`: newly drawn rows.
    `roles`: the role of each tensor (in, output, logit_row, logit_bias, state). `index`: the new expert's index.
    `inputs` [n, D]: the tokens of a held-out batch routed to the parent, or without a parent those that no expert
    received; None without such a batch. Draw from `generator` only. The first result in the order typed is used.
    """


@hookspec
def moe_report(run: "Run") -> "list[str]":  # type: ignore[empty-body]
    """Write a report on a finished run into its folder; return the names of the files.

    `run` gives folder, summary, records and plugins as stored on disk, so a report can be written again at any time.
    Import plotting libraries here, not at the top of the file.
    """


@hookspec(firstresult=True)
def moe_task(spec: "TaskSpec") -> "Task":  # type: ignore[empty-body]
    """Return the data, the model, the loss and the evaluation of a run.

    Only the plugin named by `--task` is asked. `spec` gives data_dir and seed.
    """


@hookspec(firstresult=True)
def moe_family(model: "nn.Module") -> "Family":  # type: ignore[empty-body]
    """Return how the MoE blocks of a foreign model are found, read and changed.

    The plugin is named after the `model_type` of the model's config, and loaded only for such a model. The functions
    that a `Family` is given must be functions of a module, so that an adopted model can be pickled.
    """


@hookspec
def moe_check(setup: "Setup") -> "str | Finding | None":
    """Return a sentence on why this combination makes no sense, a remark on it, or None.

    Called before anything is built. `setup` gives plugins (by name), spec, task and sizes, and finds conflicting
    plugins: `others(self, hook=..., effect=...)`. A sentence refuses the combination, and all sentences are shown
    together; a `Finding` is shown when a run begins and kept in its summary.
    """


HOOKS: dict[str, Any] = {name: value for name, value in list(globals().items()) if name.startswith("moe_")}
