"""upcycle(engine, model): dense feed-forward blocks of a transformers model become engine layers of their copies.

A layer takes its block's place, under the block's name: `model.layers.1.mlp.router.weight`,
`model.layers.1.mlp.experts.w_in`.

Suffixes: T tokens, D model, E experts.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contract.families import DenseBlock
from ..contract.growth import Growth, NewExpert
from ..contract.numerics import without_autocast
from ..contract.options import Settings, parse_settings
from ..contract.setup import Bound
from ..engine.builder import LayerBuild, layer_name, spec_of
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..growth.transaction import check_rows, fresh_row
from ..layer.moe import MoE
from ..layer.probing import evaluating, uncounted
from ..registry.manager import Plugins
from ..seeds import generator
from .adopted import CopiedHook
from .calls import Calls, follow
from .families import dense_blocks_of
from .logits import logits_on, moved, probe_of
from .upcycled import DenseCopies, DenseWeights, Surroundings, upcycled_layers, weights_of

OF_THE_MODEL = ("dim", "hidden", "out", "activation", "bias")  # of a layer's spec
PROBE = 32  # tokens on which a block and its copy are compared
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2  # of their outputs, relative to the largest, in fp32 and below


@attrs.frozen
class Upcycled:
    """What `upcycle` did. layers: their names. experts: E. change: the largest |difference| of the model's logits on
    16 random tokens, relative to the largest |logit|; None if the model takes no token ids.
    """

    layers: tuple[str, ...]
    experts: int
    change: float | None


def upcycle(
    engine: Engine,
    model: nn.Module,
    *,
    experts: int = 8,
    top_k: int = 2,
    layers: str | Iterable[int] = "every 2",
    initializer: str | None = None,
    family: str | None = None,
    settings: Iterable[str] | Settings = (),
    **spec: Any,
) -> Upcycled:
    """Turn feed-forward blocks of a dense transformers model into layers of the engine; changes the model in place.

    W_e = W for each expert e, with a random router (Komatsuzaki et al., 2022: Sparse Upcycling). Where a token's gates
    sum to 1, as those of `topk` do for K > 1, the model computes what it did; `Upcycled.change` says how far. From then
    on every router, bias, loss, trigger and metric of the engine applies, and its layers grow.

        engine = Engine("saturation,switch_aux")
        upcycle(engine, model, experts=8, layers="every 2")

    layers: "all", "every N" (the last of each N), or the indices of the model's layers. initializer: an initializer
    plugin that makes each expert of the dense block instead of copying it, with its options in `settings`: `clone` adds
    noise, `partial_reinit` draws a share of the hidden units again (Nakamura et al., 2025: Drop-Upcycling). Router rows
    stay random. family: instead of the one named after the model's type. settings: plugin options of these layers.
    spec: more of the layers' `Spec`. With shared=S, S more copies are shared experts, and the output weights of all are
    divided by 1 + S. Padding tokens get 0 from the experts. Dropout inside a block is left out.

    Raises UsageError, and changes nothing, for a model without a known dense block, a layer that has none, blocks that
    are upcycled already or compute something else than an MLP, and weights that can't be copied.
    """
    _refuse_unable(engine, experts, spec)
    chosen = _chosen(dense_blocks_of(model, family), dict(upcycled_layers(model)), layers)
    options = dict(parse_settings(settings))
    make = None if initializer is None else _initializer(engine, initializer, options.pop(initializer, None))
    sizes = {**engine.defaults, "experts": experts, "top_k": top_k, "causal": True, **spec}
    made = []
    for block in chosen:
        weights = weights_of(block)
        build = LayerBuild(
            engine.plugins,
            typed := spec_of({**sizes, **weights.sizes}),
            layer_name(block.name, engine.layers, 0),
            options,
            bank=DenseCopies(typed, weights),
        )
        made.append(_filled(engine.built(build), block, weights, make))
    change = _put_in_place(engine, model, chosen, made)
    return Upcycled(tuple(layer.name for layer in made), experts, change)


def _refuse_unable(engine: Engine, experts: int, spec: dict[str, Any]) -> None:
    if engine.dense:
        message = "this engine builds dense layers, so nothing would be upcycled; build it without dense=True"
        raise UsageError(message, code="dense-engine")
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 2:
        raise UsageError(f"experts={experts!r}: upcycling makes at least 2 experts of a block", code="too-few-experts")
    if given := [name for name in spec if name in OF_THE_MODEL]:
        message = f"{listed(given)} of an upcycled layer come from the dense block; leave them out"
        raise UsageError(message, code="bad-layer-spec")
    if banks := engine.implementing("moe_experts"):
        message = f"the experts of an upcycled layer are copies of the block, so '{banks[0]}' has no place; remove it"
        raise UsageError(message, code="several-banks")


def _chosen(blocks: list[DenseBlock], done: dict[str, MoE], layers: str | Iterable[int]) -> list[DenseBlock]:
    """The blocks of the layers that were asked for. done: the layers that are upcycled already."""
    dense, taken = {block.index: block for block in blocks}, {int(name.split(".")[-2]) for name in done}
    known = sorted({*dense, *taken})
    wanted = wanted_layers(layers, known)
    if already := [index for index in wanted if index in taken]:
        message = f"layers {listed(map(str, already))} are upcycled already; name others"
        raise UsageError(message, code="upcycled-already")
    if unknown := [index for index in wanted if index not in dense]:
        row = known == list(range(len(known)))
        have = f"0 to {known[-1]}" if row else listed(map(str, known))
        message = f"the model has no dense feed-forward block in layer {unknown[0]}; it has them in {have}"
        raise UsageError(message, code="unknown-block")
    return [dense[index] for index in wanted]


def wanted_layers(layers: str | Iterable[int], known: Sequence[int]) -> list[int]:
    """The indices of layers that a user means."""
    if layers == "all":
        return [*known]
    every = re.fullmatch(r"every ([1-9]\d*)", layers) if isinstance(layers, str) else None
    if every:
        step = int(every[1])
        if found := [index for index in known if index % step == step - 1]:
            return found
        raise UsageError(f"'{layers}' takes none of {known[-1] + 1} layers; name a smaller number", code="bad-layers")
    indices = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else sorted({*layers})
    if not indices or not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        message = f"layers are 'all', 'every N' or a list of indices, not {layers!r}"
        raise UsageError(message, code="bad-layers")
    return indices


# -- the experts -------------------------------------------------------------------------------------------


@attrs.frozen
class _Making:
    """An initializer that makes experts of a dense block."""

    plugins: Plugins
    bound: Bound
    random: torch.Generator


def _initializer(engine: Engine, name: str, given: Any) -> _Making:
    plugins = Plugins([name], settings={name: given or engine.plugins.given.get(name, {})})
    bound = next((one for one in plugins.bind("moe_new_expert") if one.plugin == name), None)
    if bound is None:
        message = f"'{name}' makes no new experts; name an initializer, such as 'clone' or 'partial_reinit'"
        raise UsageError(message, code="no-initializer")
    return _Making(plugins, bound, generator(engine.seed, "upcycling"))


@torch.no_grad()
def _filled(layer: MoE, block: DenseBlock, dense: DenseWeights, making: _Making | None) -> MoE:
    """A new layer that computes what its block does, if gates sum to 1 and no initializer varies the copies."""
    like = next(block.module.parameters())
    layer = layer.to(like.device, like.dtype).train(block.module.training)
    for name, row in dense.rows.items():
        getattr(layer.experts, name).copy_(row)  # what fp32 can't hold, too
    _check_alike(layer, block, like)
    if making is not None:
        _vary(layer, dense, making)
    if layer.shared is not None:
        _share(layer, dense)
    return layer


def _check_alike(layer: MoE, block: DenseBlock, like: Tensor) -> None:
    """Raise UsageError unless an expert computes what its block does."""
    random = torch.Generator().manual_seed(0)
    x_TD = torch.randn(PROBE, layer.spec.dim, generator=random).to(like.device, like.dtype)
    counts_E = torch.tensor([PROBE, *[0] * (layer.spec.experts - 1)], device=like.device)
    with evaluating(block.module), without_autocast(like.device):
        own_TD, copied_TD = block.module(x_TD[None])[0], layer.experts(x_TD, counts_E)
    apart = moved(own_TD.float(), copied_TD.float())
    if not apart <= (TOLERANCE if like.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE):
        message = (
            f"{block.name} ({type(block.module).__name__}) computes something else than {' and '.join(block.at.maps)} "
            f"with {block.at.act}: a copy differs by {apart:.2g}; declare it in a family, or leave it dense"
        )
        raise UsageError(message, code="not-an-mlp")


def _vary(layer: MoE, dense: DenseWeights, making: _Making) -> None:
    """Let an initializer make each expert of the dense block."""
    bank = layer.experts
    axes = {f"experts.{name}": (getattr(bank, name), axis) for name, axis in bank.axes.items()}
    roles = {where: axis.role for where, (_, axis) in axes.items()}
    for expert in range(layer.spec.experts):
        parent = {f"experts.{name}": row.clone() for name, row in dense.rows.items()}
        fresh = {where: fresh_row(tensor, axis, making.random) for where, (tensor, axis) in axes.items()}
        offer = {"parent": parent, "growth": Growth(layer.name, (None,)), "index": expert, "fresh": fresh}
        offer |= {"roles": roles, "generator": making.random, "inputs": None}
        new: NewExpert = making.plugins.ask(making.bound, NewExpert, offer)
        check_rows(making.bound.plugin, "", new.values, fresh, all_of_them=True)
        for where, row in new.values.items():
            axes[where][0][expert].copy_(row)


def _share(layer: MoE, dense: DenseWeights) -> None:
    """Let shared experts be copies too; all copies together give what one gave."""
    shared, bank, count = layer.shared, layer.experts, layer.spec.shared
    assert shared is not None and isinstance(bank, DenseCopies)
    parts = 2 if layer.spec.activation == "swiglu" else 1
    into = [("weight", dense.rows["w_in"].t())] + ([("bias", dense.rows["b_in"])] if layer.spec.bias else [])
    for name, value in into:
        repeated = value.unflatten(0, (parts, -1)).repeat(1, count, *[1] * (value.dim() - 1))
        getattr(shared.enter, name).copy_(repeated.flatten(0, 1))
    shared.leave.weight.copy_(dense.rows["w_out"].t().repeat(1, count))
    outputs: list[Any] = [bank.w_out, shared.leave.weight]
    if layer.spec.bias:
        shared.leave.bias.copy_(count * dense.rows["b_out"])
        outputs += [bank.b_out, shared.leave.bias]
    for output in outputs:
        output.div_(1 + count)
    shared.act = dense.own or shared.act


# -- in the model ------------------------------------------------------------------------------------------


def _put_in_place(engine: Engine, model: nn.Module, blocks: list[DenseBlock], layers: list[MoE]) -> float | None:
    """Replace the blocks by the layers; returns the change of the model's logits."""
    ids = probe_of(model)
    with evaluating(model), uncounted(engine.layers):
        before = None if ids is None else logits_on(model, ids)
    try:
        for block, layer in zip(blocks, layers, strict=True):
            _replace(model, block.name, layer)
        with evaluating(model), uncounted(engine.layers):
            change = None if ids is None or before is None else moved(before, logits_on(model, ids))
    except BaseException:
        for block in blocks:
            _replace(model, block.name, block.module)
        raise
    calls = Calls()
    follow(calls, model, [*layers], CopiedHook)
    for layer in layers:
        layer.register_forward_pre_hook(Surroundings(calls), with_kwargs=True)
    return change


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    where, _, own = name.rpartition(".")
    setattr(model.get_submodule(where), own, module)
