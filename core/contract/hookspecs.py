"""The contract: every hook that a plugin may implement, and nothing else.

A plugin is a class under `@attrs.define(eq=False)`. Its fields made with `option(...)` are what a
user can set, its docstring is its help, and its methods marked `@hookimpl` are what it does. An
implementation names only the arguments that it needs. Plugins act in the order in which they were
typed. Hooks are called when a layer is built and around a step; only `moe_aux_loss` and
`moe_measure` are called in a forward, and there as plain bound methods.

Shapes: T tokens, D model, H hidden, E experts, K chosen a token, N assignments, n units of a level.
"""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Generator, Tensor

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
    """Answer the router of a layer that is being built.

    Exactly one of the chosen plugins implements this hook. `spec` says what the layer is to be:
    dim, hidden, experts, top_k and so on.
    """


@hookspec
def moe_bias(spec: "Spec", level: "LevelSpec") -> "Bias | None":
    """Answer a bias for one level of a layer's router, or None.

    Called while a layer is built, once for every level (`level` has name, size and top_k). The
    biases of all plugins are added up in the order typed.
    """


@hookspec
def moe_experts(spec: "Spec") -> "Experts | None":
    """Answer the bank of experts of a layer that is being built, or None.

    Of the chosen plugins one may answer a bank for a layer; without one the layer has a stacked MLP.
    """


@hookspec
def moe_state(spec: "Spec") -> "Part | None":
    """Answer this plugin's own state in a layer that is being built, or None.

    Every plugin gets its own back as the argument `state` of the later hooks. The state's
    tensors are saved with the layer, and its `after_step(step)` is called once per optimizer step.
    """


@hookspec
def moe_aux_loss(routing: "Routing", layer: "Layer", state: "Part | None") -> "Tensor | Mapping[str, Tensor]":  # type: ignore[empty-body]
    """Answer an auxiliary loss of one training forward: a scalar, or scalars by name.

    The answer is unweighted and attached to the graph; the core multiplies it with the plugin's
    option `weight`, averages over layers and injects the gradient.
    """


@hookspec
def moe_measure(routing: "Routing", layer: "Layer", state: "Part | None") -> "Mapping[str, Tensor]":  # type: ignore[empty-body]
    """Answer tensors by name that are to be summed over forwards and processes.

    Called in each forward: in training through the ledger, so that a recomputed forward counts
    once; in evaluation as the forward runs. Names and shapes must be the same in every forward.
    They come back as `stats["PLUGIN.NAME"]`.
    """


@hookspec
def moe_metrics(  # type: ignore[empty-body]
    stats: "Stats",
    layer: "Layer",
    effects: "Effects | None",
    probe: "Routing | None",
    memory: "dict[str, Any]",
) -> "Mapping[str, float | Tensor | Finding]":
    """Answer numbers, arrays or findings by name, for one layer at a log point.

    `stats` holds the sums since the last log point (training) or over a data set (evaluation),
    and always of at least one token: a layer without data is skipped. `effects` says how much each
    loss term and each bias moves the router, `probe` holds the layer's routing of a fixed held-out
    batch; both are made only if an implementation names them, and are None where no batch was given.
    `memory` is this plugin's own for this layer and these numbers (training or evaluation): tensors and
    plain values by name, empty at first and after the layer grew, saved in checkpoints. Two plugins that
    answer the same name are an error.
    """


@hookspec
def moe_growth(history: "History", memory: "dict[str, float]") -> "Growth | Sequence[Growth] | None":
    """Answer what is to become of the experts now: a growth, several (of different layers), or None.

    Called after each optimizer step; a trigger keeps its own interval. `history` has step, loss,
    eval_loss, layers, growths, since_growth, load(layer), busiest(layer) and state(layer), which is this
    plugin's own state in that layer. `memory` is this plugin's own: numbers by
    name, empty at first, which a checkpoint saves; what a trigger keeps anywhere else is lost when a
    run resumes. All triggers are asked, the first answer in the order typed is taken. Where there are
    several processes, all of them must answer the same: what `history` gives is the same in each.
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
    """Answer the weights of an expert that is being born, or None.

    All tensors are one expert's rows by "part.tensor", copies on the CPU: `parent` those of the expert
    that it descends from, if any, as earlier newcomers of the same growth left them; `fresh` newly drawn
    ones. `roles` says what each is (in, output, logit_row, logit_bias, state), `index` which expert it
    will be. `inputs` [n, D] are the tokens of a held-out batch that go to the parent, without a parent those
    that no expert got, None where there is no such batch. Draw from `generator` only. The first answer in
    the order typed is taken.
    """


@hookspec
def moe_report(run: "Run") -> "list[str]":  # type: ignore[empty-body]
    """Write what a finished run is to be remembered by into its folder; answer the names of the files.

    `run` gives folder, summary, records and plugins, as they stand on disk: a report can be
    written again at any time. Import drawing libraries here, not at the top of the file.
    """


@hookspec(firstresult=True)
def moe_task(spec: "TaskSpec") -> "Task":  # type: ignore[empty-body]
    """Answer the data, the model, the loss and the evaluation of a run.

    Only the plugin named by `--task` is asked. `spec` gives data_dir and seed.
    """


@hookspec
def moe_check(setup: "Setup") -> "str | Finding | None":
    """Answer one sentence why this mix of plugins and settings makes no sense, a remark on it, or None.

    Called before anything is built. `setup` gives plugins (by name), spec and task. A sentence refuses the
    mix, and all of them are shown together; a `Finding` is shown when a run begins, and kept in its summary.
    """


HOOKS: dict[str, Any] = {name: value for name, value in list(globals().items()) if name.startswith("moe_")}
