"""Claims about families."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.families import Family
from ..contract.growth import Growth
from ..engine.engine import Engine
from ..pretrained.adopted import adopted_blocks
from ..pretrained.adopting import adopt
from ..pretrained.exporting import export
from ..pretrained.families import family_plugin
from ..pretrained.upcycled import upcycled_layers
from ..pretrained.upcycling import upcycle
from ..pretrained.watching import watch
from ..run.training import adam
from .bench import Bench
from .claims import NotApplicable, claim, demand
from .tiny_models import tiny_model

CLOSE = 1e-5  # of logits, relative to the largest


def _trial(bench: Bench) -> tuple[nn.Module, Family]:
    """A tiny model of the family, its weights wide enough to choose, and what the plugin says about it."""
    plugin: Any = bench.plugin.cls()
    try:
        import transformers  # noqa: F401

        model = plugin.trial_model() if hasattr(plugin, "trial_model") else tiny_model(bench.plugin.name)
    except ImportError as error:
        raise NotApplicable("transformers is not installed") from error
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model.eval(), family_plugin(bench.plugin.found, model)


def _adoptable(bench: Bench) -> nn.Module:
    model, family = _trial(bench)
    if not family.tensors:
        raise NotApplicable("the family only reads")
    return model


def _is_dense(model: nn.Module, family: Family) -> bool:
    return not any(family.blocks(model)) and any(family.dense_blocks(model))


def _adopted(bench: Bench, model: nn.Module) -> Engine:
    engine = Engine()
    adopt(engine, model, family=bench.plugin.name)
    return engine


def _batch() -> tuple[Tensor, Tensor]:
    """(ids, mask) of two sequences, the first padded on the left."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def _run(model: Any, **more: Any) -> Any:
    ids, mask = _batch()
    extra = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=ids, attention_mask=mask, **extra, **more)


def _outputs(model: nn.Module) -> Tensor:
    """The logits of the real tokens; the hidden states of a model without a head."""
    answer = _run(model)
    outputs: Tensor = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
    return outputs[_batch()[1].bool()]


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return _outputs(model)


@claim("moe_family")
def reads_the_models_own_decisions(bench: Bench) -> None:
    """Watching finds the logits that the model itself returns, and counts every choice of its blocks."""
    model, family = _trial(bench)
    if _is_dense(model, family):
        raise NotApplicable("the family's blocks are dense")
    with torch.no_grad(), watch(Engine(), model, record=True, family=bench.plugin.name) as watcher:
        answer = _run(model, output_router_logits=True) if _returns_logits(model) else _run(model)
        metrics = watcher.metrics()
    named = {layer.name: layer for layer in watcher.trace.layers}
    silent = [name for name in metrics if name not in named]
    demand(not silent, f"nothing was seen of {silent}; check `router`, `experts` and `decides`")
    own = [one for one in getattr(answer, "router_logits", None) or () if isinstance(one, Tensor)]
    for layer in watcher.trace.layers:
        (forward,) = layer.forwards
        logits_TE = forward.logits["expert"]
        count = len(forward.token)
        demand(bool(logits_TE.isfinite().all()), f"{layer.name} has logits that are not finite; check `logits`")
        demand(count == logits_TE.shape[0] * layer.spec.top_k, f"{layer.name} counted {count} choices")
        flat = [one.reshape(-1, one.shape[-1]).float() for one in own]
        same = any(one.shape == logits_TE.shape and torch.equal(one, logits_TE) for one in flat)
        demand(same or not own, f"{layer.name} has other logits than the model returns; check `logits`")


def _returns_logits(model: Any) -> bool:
    return hasattr(model.config, "output_router_logits")


@claim("moe_family")
def adopting_changes_no_logit(bench: Bench) -> None:
    """An adopted model has the logits, names and tensors that it had, and so have its copies."""
    model = _adoptable(bench)
    before, state = _logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    _adopted(bench, model)
    try:
        pickled = pickle.loads(pickle.dumps(model))
    except Exception as error:
        demand(False, f"an adopted model can't be pickled: {error}; let `recipe` and `score` be functions of a module")
    for what, one in {"it": model, "its deep copy": copy.deepcopy(model), "its pickle": pickled}.items():
        after = _logits(one)
        moved = float((after - before).abs().max() / before.abs().max())
        demand(moved <= CLOSE, f"the logits of {what} differ by {moved:.2g} of the largest; check `recipe`")
        demand(list(one.state_dict()) == list(state), f"the state of {what} has other names")


@claim("moe_family")
def growth_keeps_names_and_layout(bench: Bench) -> None:
    """Growth changes the tensors' expert axes and nothing else, the optimizer's moments too."""
    model = _adoptable(bench)
    engine = _adopted(bench, model)
    optimizer = adam(model, 0.0)
    model.train()
    (_outputs(model).sum() + engine.aux_loss()).backward()
    engine.after_backward()
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for layer in engine.layers:
        engine.grow(Growth(layer.name, (1,)), optimizer)
    declared = {}
    for adopted in adopted_blocks(model):
        for path, stored in adopted.block.family.tensors.items():
            declared[f"{adopted.block.name}.{path}"] = stored.axis
    for parameter, name in names.items():
        rows = before[name].shape[declared[name]] if name in declared else None
        kept = parameter if rows is None else parameter.narrow(declared[name], 0, rows)
        demand(torch.equal(kept, before[name]), f"growth changed '{name}' elsewhere than along its expert axis")
        demand(rows is None or parameter.shape[declared[name]] == rows + 1, f"'{name}' did not grow")
        moments = [value for value in optimizer.state.get(parameter, {}).values() if value.dim()]
        demand(all(one.shape == parameter.shape for one in moments), f"the moments of '{name}' did not follow")
    demand(bool(_logits(model.eval()).isfinite().all()), "the grown model's logits are not finite")


@claim("moe_family")
def exported_model_loads_equal(bench: Bench) -> str | None:
    """A grown model that is exported loads with equal logits, as many experts in its config."""
    model: Any = _adoptable(bench)
    engine = _adopted(bench, model)
    counted = adopted_blocks(model)[0].block.family.count
    for layer in engine.layers if counted else ():
        engine.grow(Growth(layer.name, (None,)))
    exported = export(engine, model, bench.folder / "exported")
    again = type(model).from_pretrained(exported.folder)
    moved = float((_logits(again) - _logits(model)).abs().max() / _logits(model).abs().max())
    demand(moved <= CLOSE, f"the logits of the exported model differ by {moved:.2g} of the largest; check `tensors`")
    return None if counted else "the family names no `count`, so only a model that did not grow can be exported"


@claim("moe_family")
def upcycling_changes_no_logit(bench: Bench) -> str | None:
    """Dense blocks become mixtures of their copies with equal logits; the mixture that is exported has them too."""
    model, family = _trial(bench)
    if not any(family.dense_blocks(model)):
        raise NotApplicable("the family's models have no dense block of this kind")
    mixed, before, engine = any(family.blocks(model)), _logits(model), Engine()
    upcycle(engine, model, experts=4, layers="all", family=bench.plugin.name)
    moved = float((_logits(model) - before).abs().max() / before.abs().max())
    demand(moved <= CLOSE, f"upcycling moves the logits by {moved:.2g} of the largest; check `dense`")
    (spec, *_) = (layer.spec for _, layer in upcycled_layers(model))
    native = family.native(getattr(model, "config", None), spec, [])
    if mixed or isinstance(native, str):
        return None if mixed else f"not exported: {native}"
    exported = export(engine, model, bench.folder / "upcycled")
    demand(exported.change is None or exported.change <= CLOSE, f"the exported mixture differs by {exported.change}")
    return None
