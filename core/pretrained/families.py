"""Find the family plugin of a foreign model, and its blocks."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

from torch import nn

from ..contract.families import Block, DenseBlock, Family
from ..contract.options import build
from ..contract.setup import Bound
from ..errors import PluginError, UsageError, listed, nearest
from ..registry.discovery import Found, find, load, pick

GENERIC = "generic"  # the family of models without one


def blocks_of(model: nn.Module, family: str | None = None) -> list[Block]:
    """The MoE blocks of a model, in order, by the family of its type, or else by the generic one.

    family: the name of another family to use. Raises UsageError for a model without blocks.
    """
    found = (list(one.blocks(model)) for one in families_of(model, family))
    blocks = next((blocks for blocks in found if blocks), None)
    if blocks is None:
        raise UsageError(_not_found(model, [one.name for one in families_of(model, family)]), code="no-known-block")
    return blocks


def dense_blocks_of(model: nn.Module, family: str | None = None) -> list[DenseBlock]:
    """The dense feed-forward blocks of a model, in order, by the first of its families that knows them.

    family: the name of another family to use. Raises UsageError for a model without such blocks.
    """
    found = (list(one.dense_blocks(model)) for one in families_of(model, family))
    blocks = next((blocks for blocks in found if blocks), None)
    if blocks is None:
        looks = {" and ".join(at.maps) for one in families_of(model, family) for at in one.dense}
        message = (
            f"{titled(model)} has no dense feed-forward block that is known: a module of a layer with "
            f"{' or '.join(sorted(looks))}; say in a family's `dense` where its parts are"
        )
        raise UsageError(message, code="no-known-block")
    return blocks


def families_of(model: nn.Module, family: str | None = None) -> Iterator[Family]:
    """The families that may know a model: those of its types, then the generic one; or only the one that is named.

    Each is loaded when its turn comes. Raises UsageError if there is no family of that name.
    """
    installed = find()
    if family is not None and (family not in installed or installed[family][0].kind != "family"):
        raise UsageError(f"there is no family '{family}'; {nearest(family, families())}", code="unknown-family")
    for name in [family] if family else [*(name for name in _model_types(model) if name in families()), GENERIC]:
        yield family_plugin(pick(name, installed), model)


def families() -> list[str]:
    """The names of the installed families."""
    return [name for name, (first, *_) in find().items() if first.kind == "family"]


def family_plugin(found: Found, model: nn.Module) -> Family:
    """What a family plugin says about a model. Raises PluginError if it fails."""
    plugin: Any = build(load(found), found.title, {})
    origin = f"{found.title} ({found.distribution} {found.version})"
    try:
        answer = Bound(found.name, plugin.moe_family, tuple(signature(plugin.moe_family).parameters))({"model": model})
    except UsageError:
        raise
    except Exception as error:
        message = f"{origin} fails in moe_family: {type(error).__name__}: {error}"
        raise PluginError(message, code="plugin-failed") from error
    if not isinstance(answer, Family):
        raise PluginError(f"{origin}: moe_family returned {answer!r}, not a Family", code="hook-wrong-type")
    answer.name = found.name
    return answer


def _model_types(model: nn.Module) -> list[str]:
    """The model types of the configs in a model: the whole one's first, then those of its parts."""
    kinds = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(kind.replace("-", "_") for kind in kinds if isinstance(kind, str)))


def titled(model: nn.Module) -> str:
    """A model in messages, by its class and model types."""
    types = _model_types(model)
    return f"{type(model).__name__} (model_type {listed(map(repr, types))})" if types else type(model).__name__


def _not_found(model: nn.Module, names: list[str]) -> str:
    looked = f"tried the {listed(map(repr, names))} {'family' if len(names) == 1 else 'families'}"
    return (
        f"{titled(model)} has no block that is known; {looked}: modules with a router, as transformers "
        "records router_logits, next to experts that are called with the chosen experts and their weights; "
        "`moe-engine new-plugin family NAME` starts a family for it; for layers of engine.moe() call engine.metrics()"
    )
