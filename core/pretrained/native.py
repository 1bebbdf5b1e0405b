"""The architecture of transformers that holds an upcycled model, and the model there.

Suffixes: E experts, D model, H hidden, W entering the hidden units.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from ..contract.families import Block, Family, Stored
from ..contract.parts import LinearRouter
from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..layer.moe import MoE
from ..registry.discovery import find, pick
from .adopted import folded
from .adopting import lost_of, told
from .families import dense_blocks_of, families_of, family_plugin
from .upcycled import DenseCopies, upcycled_layers

INSTEAD = "save the engine's own state with moe_engine.save(), from which the upcycled model can be loaded"


@attrs.frozen(eq=False)
class Written:
    """What an export writes: a model of transformers. family: the name of the one by which it is adopted again."""

    model: Any
    family: str


def native_of(engine: Engine, model: Any) -> Written:
    """The same mixture in the architecture that holds it, over the same tensors where they are stored alike.

    Raises UsageError if no architecture does.
    """
    layers = dict(upcycled_layers(model))
    spec = next(iter(layers.values())).spec
    found = next(families_of(model)).native(model.config, spec, _still_dense(model))
    if isinstance(found, str):
        raise _refused(model, found)
    model_type, values, zeros = found
    kind = _counterpart(model, model_type)
    plain = kind.config_class()
    kept = {name: value for name, value in model.config.to_dict().items() if hasattr(plain, name)}
    for name in ("architectures", "model_type", "transformers_version"):
        kept.pop(name, None)
    with torch.device("meta"):
        native = kind(kind.config_class(**{**kept, **values}))
    family = family_plugin(pick(model_type, find()), native)
    blocks = [block for block in family.blocks(native) if block.name in layers]
    _refuse_lost(engine, model, blocks, layers)
    own = tuple(f"{name}." for name in layers)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    for block in blocks:
        layer = layers[block.name]
        state |= {f"{block.name}.{path}": value for path, value in _stored(family, layer).items()}
        like = next(layer.experts.parameters())
        state |= {f"{block.name}.{path}": like.new_zeros(block.tensor(path).shape) for path in zeros}
    report = native.load_state_dict(state, strict=False, assign=True)
    if strange := [*report.missing_keys, *report.unexpected_keys]:
        raise _refused(model, f"{kind.__name__} has other tensors: {listed(strange[:3])}")
    native.generation_config = model.generation_config
    return Written(native.eval(), model_type)


def _refused(model: Any, why: str) -> UsageError:
    return UsageError(f"{type(model).__name__} can't be exported as it is: {why}; {INSTEAD}", code="not-exportable")


def _still_dense(model: Any) -> list[int]:
    try:
        return [block.index for block in dense_blocks_of(model)]
    except UsageError:  # none is left
        return []


def _counterpart(model: Any, model_type: str) -> Any:
    """The class of another model type with the same head."""
    import transformers

    auto = vars(transformers.models.auto.modeling_auto)
    for table in (value for name, value in auto.items() if name.endswith("MAPPING_NAMES")):
        if table.get(model.config.model_type) == type(model).__name__ and model_type in table:
            return getattr(transformers, table[model_type])
    raise _refused(model, f"'{model_type}' has no model with the same head")


def _refuse_lost(engine: Engine, model: Any, blocks: list[Block], layers: Mapping[str, MoE]) -> None:
    """Raise UsageError for what the native blocks can't hold."""
    (router,) = engine.implementing("moe_router")
    lost: list[tuple[str, str]] = []
    for block in blocks:
        layer, (name, _) = layers[block.name], block.family.recipe(block) or ("", {})
        lost += [(what, block.name) for what in lost_of(layer, router == name, block.bias is not None)]
        lost += [("shared experts", block.name)] * bool(layer.spec.shared)
        lost += [("biases of experts", block.name)] * layer.spec.bias
    if lost:
        raise _refused(model, f"{type(blocks[0].module).__name__} can't hold {told(lost)}")


def _stored(family: Family, layer: MoE) -> dict[str, Tensor]:
    """A layer's tensors by their paths in a block, laid out as a family stores them."""
    bank, router, found = layer.experts, layer.router, {}
    assert isinstance(bank, DenseCopies) and isinstance(router, LinearRouter)
    for path, stored in family.tensors.items():
        if stored.role == "logit_row":
            found[path] = router.weight.movedim(0, stored.axis)
        elif stored.role in ("in", "output"):
            found[path] = _laid_out(bank.w_in if stored.role == "in" else bank.w_out, stored)
    return {path: value.detach().contiguous() for path, value in found.items()}


def _laid_out(weight: Tensor, stored: Stored) -> Tensor:
    """w_in [E, D, W] or w_out [E, H, D], with its dimensions where they are stored."""
    if stored.interleaved:
        weight = weight.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    entering = stored.fan_in
    assert entering is not None
    weight = weight.movedim((0, 1, 2), (stored.axis, entering, 3 - stored.axis - entering))
    return folded(weight, stored) if stored.flat else weight
