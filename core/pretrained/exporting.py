"""export(engine, model, folder): a folder that `from_pretrained` loads, in the architecture's own names and layout."""

import copy
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import attrs
from torch import Tensor, nn

from ..engine.engine import Engine
from ..errors import UsageError, listed
from ..layer.probing import evaluating, uncounted
from .adopted import LAYER, Adopted, adopted_blocks, folded, set_count
from .adopting import adopt, lost_in_plain
from .logits import logits_on, moved, probe_of, tolerance
from .native import Written, native_of
from .upcycled import upcycled_layers


@attrs.frozen
class Exported:
    """What an export wrote. folder. experts: E. change: the largest |difference| of logits after loading it again,
    relative to the largest |logit|; None if the model takes no token ids. It may be more than rounding only for tokens
    whose scores are equal, as of exact copies of an expert: transformers parts them by their index.
    """

    folder: Path
    experts: int
    change: float | None


def export(
    engine: Engine, model: Any, folder: str | Path, *, tokenizer: Any = None, max_shard_size: str = "5GB"
) -> Exported:
    """Write an adopted or upcycled model as a plain checkpoint of transformers, load it again and compare the logits.

    An upcycled model is written as the mixture of its kind, a Llama as a Mixtral. The model itself is left as it is.
    Selection biases of the engine are added to the block's own where the architecture has a place for them. tokenizer:
    is saved too. Raises UsageError, and leaves no folder, for what the format can't hold: a bias without a place, a
    router that decides otherwise, a capacity, layers with different numbers of experts, adapters, layers that are
    dense in an architecture of mixtures; or if the model that was loaded again answers differently.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} already exists; name another folder", code="folder-exists")
    found, upcycled = adopted_blocks(model), dict(upcycled_layers(model))
    if not found and not upcycled:
        message = f"{type(model).__name__} has no adopted or upcycled block; call its save_pretrained()"
        raise UsageError(message, code="not-adopted")
    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        message = f"{type(model).__name__} is not a model of transformers, or wraps one; merge adapters, export that"
        raise UsageError(message, code="not-exportable")
    if found and upcycled:
        message = f"{type(model).__name__} has adopted and upcycled blocks, for which no format has a place"
        raise UsageError(f"{message}; save the engine's own state with moe_engine.save()", code="not-exportable")
    experts = _one_size(found) if found else one_size((name, layer.spec.experts) for name, layer in upcycled.items())
    written = Written(model, found[0].block.family.name) if found else native_of(engine, model)
    if found and (lost := lost_in_plain(found)):
        raise UsageError(
            f"{type(model).__name__}'s format can't hold {lost}; remove it, or save the engine's own state with "
            "moe_engine.save(), from which the adopted model can be loaded",
            code="not-exportable",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with plain_config(model, found, experts) if found else nullcontext():
            state = plain_state(model, found) if found else None
            written.model.save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        change = _reloaded(engine, model, written, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, experts, change)


def one_size(sizes: Iterable[tuple[str, int]]) -> int:
    """The one number of experts of these blocks. Raises UsageError for several."""
    names: dict[int, list[str]] = {}
    for name, size in sizes:
        names.setdefault(size, []).append(name)
    if len(names) > 1:
        named = listed(f"{size} experts in {listed(blocks)}" for size, blocks in names.items())
        message = f"the config has one number of experts for all layers: {named}; grow the rest"
        raise UsageError(message, code="not-one-size")
    return next(iter(names))


def _one_size(found: list[Adopted]) -> int:
    experts = one_size((adopted.block.name, adopted.bank.count) for adopted in found)
    grown = [adopted.block.name for adopted in found if adopted.bank.count != adopted.born]
    if grown and not found[0].shared.count:
        message = f"the config has no number of experts for {listed(grown)} alone, which grew; export it as it was"
        raise UsageError(message, code="not-exportable")
    return experts


def plain_state(model: nn.Module, found: list[Adopted]) -> dict[str, Tensor]:
    """The model's state without the engine's, in the architecture's layout, selection biases added up."""
    state = {name: value for name, value in model.state_dict().items() if f".{LAYER}." not in name}
    for adopted in found:
        block = adopted.block
        for path, stored in block.family.tensors.items():
            name = f"{block.name}.{path}"
            if stored.flat:
                state[name] = folded(state[name], stored)
            if stored.role == "state":
                state[name] = adopted.selection_bias().view_as(state[name]).to(state[name].dtype)
    return state


@contextmanager
def plain_config(model: Any, found: list[Adopted], experts: int) -> Iterator[None]:
    """Inside, the model's config is that of the plain model."""
    shared = found[0].shared
    before = copy.deepcopy(model.config.__dict__)
    for config in [model.config, *(value for value in vars(model.config).values() if hasattr(value, "model_type"))]:
        set_count(config, shared.count, experts)
        for owner, setting, value in shared.own_loss:
            if owner is config:
                setattr(config, setting, value)
    try:
        yield
    finally:
        model.config.__dict__.clear()
        model.config.__dict__.update(before)


def _reloaded(engine: Engine, model: Any, written: Written, folder: Path) -> float | None:
    """The relative change of logits in the model that was loaded again.

    Raises UsageError if it answers differently although equal scores are parted alike, as they are once it is adopted.
    """
    try:
        again, report = type(written.model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        problem = str(error).strip().splitlines()[-1]
        raise UsageError(f"what was written does not load: {problem}; nothing is left", code="not-reloaded") from error
    strange = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong = listed(f"{kind.replace('_', ' ')} {listed(keys[:3])}" for kind, keys in strange.items() if keys)
    if wrong:
        raise UsageError(f"what was written does not load as it was: {wrong}; nothing is left", code="not-reloaded")
    ids = probe_of(model)
    if ids is None:
        return None
    again.to(model.device).eval()
    with evaluating(model), uncounted(engine.layers):
        before = logits_on(model, ids)
    plain = logits_on(again, ids)
    adopted = logits_on(adopt(Engine(), again, family=written.family), ids)
    if not (change := moved(before, adopted)) <= tolerance(model.dtype):
        message = f"what was written answers differently when loaded, by {change:.3g} of the largest logit"
        raise UsageError(f"{message}; nothing is left", code="not-reloaded")
    return moved(before, plain)
