"""Find the family plugin of a foreign model, and its blocks."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

from torch import nn

from ..contract.families import Block, Family
from ..contract.options import build
from ..contract.setup import Bound
from ..errors import PluginError, UsageError, listed, nearest
from ..registry.discovery import Found, find, load, pick

GENERIC = "generic"  # the family of models that have none of their own


def blocks_of(model: nn.Module, family: str | None = None) -> list[Block]:
    """The MoE blocks of a model, in order, by the family of its type, or else by the generic one.

    family: the name of another family to use. Raises UsageError for a model without blocks.
    """
    installed = find()
    types = list(dict.fromkeys(_model_types(model)))
    if family is not None and (family not in installed or installed[family][0].kind != "family"):
        raise UsageError(f"there is no family '{family}'; {nearest(family, families())}", code="unknown-family")
    names = [family] if family else [*(name for name in types if name in families()), GENERIC]
    for name in names:
        blocks = list(family_plugin(pick(name, installed), model).blocks(model))
        if blocks:
            return blocks
    raise UsageError(_not_found(model, types, names), code="no-known-block")


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


def _model_types(model: nn.Module) -> Iterator[str]:
    """The model types of the configs in a model: the whole one's first, then those of its parts."""
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str):
            yield kind.replace("-", "_")


def _not_found(model: nn.Module, types: list[str], names: list[str]) -> str:
    looked = f"tried the {listed(map(repr, names))} {'family' if len(names) == 1 else 'families'}"
    kind = f" (model_type {listed(map(repr, types))})" if types else ""
    return (
        f"{type(model).__name__}{kind} has no block that is known; {looked}: modules with a router, as transformers "
        "records router_logits, beside experts that are called with the chosen experts and their weights; "
        "`moe-engine new-plugin family NAME` starts a family for it; for layers of engine.moe() call engine.metrics()"
    )
