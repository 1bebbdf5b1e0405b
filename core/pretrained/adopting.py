"""adopt(engine, model): the blocks of a transformers model route through engine layers over their own weights.

The block stays where it is, and runs as before, with its kernels, shared experts and adapters. Only its entry, the call
that carries its decision to its experts, asks an engine layer instead, kept as `block.moe`: its router is given the
logits that the block's own router returned, and its bank calls the block's own experts.

Suffixes: T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..contract.families import Block
from ..contract.options import Settings, parse_settings
from ..contract.parts import Bias
from ..engine.builder import LayerBuild, layer_name, spec_of
from ..engine.engine import Engine
from ..errors import UsageError, listed, nearest
from ..layer.moe import MoE
from .adopted import LAYER, Adopted, CopiedHook, Entry, Resizing, Shared, adopted_blocks, folded
from .borrowed import BorrowedBias, BorrowedExperts, borrowed_router
from .calls import follow
from .families import blocks_of
from .recipes import Own, check_alike, own_decision, sizes_of
from .tapping import Tap

IDLE = 1e-6  # a bias below this is rounding


def adopt(
    engine: Engine,
    model: nn.Module,
    *,
    family: str | None = None,
    layers: Iterable[str] | None = None,
    settings: Iterable[str] | Settings = (),
    keep_own_loss: bool = False,
    **spec: Any,
) -> nn.Module:
    """Let an engine decide in the MoE blocks of a transformers model; returns the model, changed in place.

    The blocks keep their parameters, names and kernels, and logits stay what they were: the family plugin names the
    router that decides as the block does, unless the engine was built with a router. From then on every router, bias,
    loss, trigger and metric of the engine applies, and the engine grows the blocks as it grows its own layers.

        engine = Engine("loss_free,health")
        adopt(engine, model)

    family: instead of the one named after the model's type. layers: names of the blocks to adopt; all by default.
    settings: plugin options of these layers. keep_own_loss: keep the model's own auxiliary loss, which is switched off
    otherwise. spec: more of the layers' `Spec`, such as capacity. Padding tokens get 0 from the experts. Raises
    UsageError for a model without a block that its family can change, or whose decisions the family's recipe does not
    reproduce.
    """
    if engine.dense:
        message = "adopt() keeps a model's blocks, but the engine is dense; build it without dense"
        raise UsageError(message, code="adopt-dense")
    blocks = _chosen(blocks_of(model, family), layers)
    for block in blocks:
        _refuse_unable(engine, block)
    recipe = blocks[0].family.recipe(blocks[0])
    if recipe is not None:
        engine.plugins.replace_router(recipe[0])
    shared = Shared(model, blocks[0].family.count)
    begun: list[Block] = []
    try:
        for block in blocks:
            begun.append(block)
            _adopt(engine, block, shared, parse_settings(settings), spec)
    except BaseException:
        for block in begun:
            put_back(block)
        raise
    follow(shared.calls, model, [block.module for block in blocks], CopiedHook)
    if not keep_own_loss:
        shared.silence()
    return model


def _chosen(blocks: list[Block], names: Iterable[str] | None) -> list[Block]:
    if names is None:
        return blocks
    known = {block.name: block for block in blocks}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise UsageError(f"the model has no block '{name}'; {nearest(name, known)}", code="unknown-block")
    return [known[name] for name in wanted]


def _refuse_unable(engine: Engine, block: Block) -> None:
    """Raise UsageError for a block that can't be adopted."""
    family = block.family
    if LAYER in block.module._modules:
        raise UsageError(f"block '{block.name}' is adopted already; call release() first", code="adopted-already")
    if not family.tensors:
        message = (
            f"family '{family.name}' only reads {type(block.module).__name__}, it does not say where its tensors are; "
            "watch() it, or start a family for it: moe-engine new-plugin family NAME"
        )
        raise UsageError(message, code="family-only-reads")
    if family.recipe(block) is None and engine.plugins.default_router is not None:
        message = f"no router plugin decides as {type(block.module).__name__} does; build the engine with a router"
        raise UsageError(message, code="family-without-recipe")
    if block.tensor(next(iter(family.tensors))).device.type == "meta":
        raise UsageError("adopt() needs a model with weights, not one on the meta device", code="meta-model")


def _adopt(engine: Engine, block: Block, shared: Shared, settings: Settings, spec: Mapping[str, Any]) -> None:
    """Put a layer into one block."""
    own = own_decision(block)
    _unfold(block)
    (router,) = (bound.plugin for bound in engine.plugins.bind("moe_router"))
    name, options = block.family.recipe(block) or ("", {})
    typed = engine.plugins.given.get(router, {})
    alike = router == name and not typed and router not in settings
    if router == name:
        settings = {**settings, router: {**options, **typed, **settings.get(router, {})}}
    build = LayerBuild(
        engine.plugins,
        spec_of({**engine.defaults, **sizes_of(block), **_choices(block, own), **spec}),
        layer_name(f"{block.name}.{LAYER}", engine.layers, 0),
        settings,
        bank=BorrowedExperts(block, shared.resized),
        borrow=partial(borrowed_router, block=block),
        extra={} if block.bias is None else {block.family.name: BorrowedBias(block)},
    )
    layer = engine.built(build).to(block.tensor(next(iter(block.family.tensors))).device)
    adopted = Adopted(block, layer, shared, alike, born=layer.spec.experts)
    if alike:
        check_alike(adopted, own)
    block.module.add_module(LAYER, layer.train(block.module.training))
    shared.layers.append(layer)
    adopted.tap = Tap(block, adopted.see, None, CopiedHook)
    block.entry.forward = Entry(adopted)
    block.module.register_load_state_dict_pre_hook(Resizing(adopted))


def _choices(block: Block, own: Own) -> dict[str, Any]:
    """How many experts a token of a block is sent to, and what follows from it."""
    _, options = block.family.recipe(block) or ("", {})
    # a block may renormalise the one gate of a token to the constant 1
    return {
        "top_k": own.top_k,
        "causal": True,
        "allow_no_gradient": own.top_k == 1 and bool(options.get("renorm")),
    }


def _unfold(block: Block) -> None:
    """Give tensors whose experts' rows lie one after the other a dimension of experts."""
    experts = sizes_of(block)["experts"]
    for path, stored in block.family.tensors.items():
        if stored.flat:
            tensor = block.tensor(path)
            tensor.data = tensor.data.unflatten(stored.axis, (experts, -1))


def _fold(block: Block) -> None:
    """Undo that."""
    for path, stored in block.family.tensors.items():
        if stored.flat and block.tensor(path).dim() == 3:
            tensor = block.tensor(path)
            tensor.data = folded(tensor.data, stored)


# -- back -------------------------------------------------------------------------------------------------


def release(engine: Engine, model: nn.Module) -> nn.Module:
    """Undo `adopt`: plain blocks again, with the weights as they are now; returns the model.

    Raises UsageError, and changes nothing, if the plain blocks would decide otherwise: another router, a bias that the
    block has no place for, or a limit on capacity.
    """
    found = adopted_blocks(model)
    if not found:
        raise UsageError(f"{type(model).__name__} has no adopted block", code="not-adopted")
    if lost := lost_in_plain(found):
        raise UsageError(f"the plain blocks can't hold {lost}; export() or save() the model instead", code="not-plain")
    for adopted in found:
        own = adopted.block.bias
        if own is not None:
            own.data.copy_(adopted.selection_bias())
        put_back(adopted.block)
    found[0].shared.restore_loss()
    drop_hooks(model)
    engine.attach(model)
    return model


def lost_in_plain(found: list[Adopted]) -> str:
    """What plain blocks can't hold of these, in words; "" if they hold all."""
    return told(
        (what, adopted.block.name)
        for adopted in found
        for what in lost_of(adopted.layer, adopted.recipe, adopted.block.bias is not None)
    )


def lost_of(layer: MoE, alike: bool, has_place: bool) -> Iterator[str]:
    """What a block of transformers can't hold of a layer.

    alike: its router decides as the block would. has_place: the block has one for a bias that only selection sees.
    """
    if not alike:
        yield f"a router that decides otherwise ({type(layer.router).__name__})"
    for name in ("capacity", "eval_capacity"):
        if getattr(layer.spec, name) is not None:
            yield f"{name}={getattr(layer.spec, name)}"
    for plugin, bias in layer.bias_levels()[0].items() if layer.bias_levels() else ():
        if not (isinstance(bias, BorrowedBias) or (bias.selection_only and has_place) or _idle(bias)):
            yield f"the bias '{plugin}'"


def told(lost: Iterable[tuple[str, str]]) -> str:
    """What is lost in which blocks, as a list in words."""
    names: dict[str, list[str]] = {}
    for what, name in lost:
        names.setdefault(what, []).append(name)
    return listed(f"{what} in {listed(blocks)}" for what, blocks in names.items())


def _idle(bias: Bias) -> bool:
    """Whether a bias moves nothing: it is 0, or the same for all experts if only selection sees it."""
    value = bias().float()
    moved = value - value.mean() if bias.selection_only else value
    return float(moved.abs().max()) < IDLE


def put_back(block: Block) -> None:
    """A plain block again."""
    entry = block.entry.__dict__.pop("forward", None)
    if isinstance(entry, Entry) and entry.adopted.tap is not None:
        entry.adopted.tap.close()
    block.module._modules.pop(LAYER, None)
    hooks = block.module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", None), Resizing)]:
        del hooks[key]
    _fold(block)


def drop_hooks(model: nn.Module) -> None:
    """Remove the hooks that follow the forwards of an adopted model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, CopiedHook)]:
                del hooks[key]
