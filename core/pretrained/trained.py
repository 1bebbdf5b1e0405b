"""Language models to use: of a run, by its newest intact checkpoint, or of a folder; their losses, and what they write.

Suffixes: B windows, S tokens of one, T tokens, V size of the vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.stats import Metrics
from ..contract.tasks import Task
from ..engine.engine import Engine
from ..errors import UsageError
from ..layer.probing import uncounted
from ..run.building import build_engine, build_model
from ..run.checkpoints import Checkpoints
from ..run.folder import old_folder
from ..seeds import generator, own_random_state
from .language_models import PretrainedLM
from .loading import finite
from .watching import Watcher, watch

TOKENS = 4096  # of one forward
Say = Callable[[str], None]


@attrs.frozen(eq=False)
class Trained:
    """A language model in eval mode. engine: of a run. watcher: of a mixture that is only read. length: of a window."""

    model: Any
    language: PretrainedLM
    length: int
    engine: Engine
    watcher: Watcher | None = None

    def balance(self) -> dict[str, Metrics]:
        """The metrics of each layer, of the forwards since the last call."""
        return self.engine.metrics("eval") if self.watcher is None else self.watcher.metrics()


def open_trained(folder: Path, device: torch.device, say: Say) -> Trained:
    """The model of a run's folder, or of a checkpoint of transformers. say: receives remarks. Raises UsageError."""
    if (folder / "config.toml").exists():
        return of_run(folder, device, say)
    if folder.is_dir() and not (folder / "config.json").exists() and not any(folder.glob("*.gguf")):
        message = f"{folder} holds neither a run (config.toml) nor a model of transformers (config.json)"
        raise UsageError(message, code="not-a-model")
    language = PretrainedLM.open(folder)
    model = language.load().to(device).eval()
    engine = Engine()
    watcher = watch(engine, model) if language.is_mixture else None
    return Trained(model, language, language.window(), engine, watcher)


def of_run(folder: Path, device: torch.device, say: Say) -> Trained:
    """The model of a run, by its newest intact checkpoint; the folder stays as it is. Raises UsageError."""
    config, settings = old_folder(folder)
    config = attrs.evolve(config, device=str(device))
    engine = build_engine(config, settings)
    make = getattr(engine.plugins.active.get(config.task), "language_model", None)
    if make is None:
        message = f"{folder} is a run of task '{config.task}', which does not train a language model of transformers"
        raise UsageError(message, code="not-a-language-model")
    tree = Checkpoints(folder / "checkpoints").newest(say, rename=False)
    if tree is None:
        message = f"{folder} has no intact checkpoint yet; one is written every --checkpoint-every steps"
        raise UsageError(f"{message}, and at the end", code="no-run-checkpoint")
    found: list[Any] = []

    def build(engine: Any) -> nn.Module:
        found.extend(make(engine))
        model: nn.Module = found[0]
        return model

    model = build_model(config, engine, Task((), (), build, lambda model, batch: {}), device)
    try:
        model.load_state_dict(tree["model"])
    except RuntimeError as error:
        message = f"the checkpoint of {folder} does not fit its model; was {found[1].folder} changed since?"
        raise UsageError(message, code="state-mismatch") from error
    return Trained(model.eval(), found[1], found[2], engine)


def merge_adapters(model: nn.Module) -> int:
    """Add every adapter (PEFT) to the weights under it and take it away; returns how many there were."""
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    for name, module in adapted:
        module.merge(safe_merge=True)
        where, _, own = name.rpartition(".")
        setattr(model.get_submodule(where), own, module.base_layer)
    for left in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(left, None)
    return len(adapted)


# -- losses ------------------------------------------------------------------------------------------------


@attrs.frozen
class TextLoss:
    """A text's mean loss in nats per token, over `tokens` predicted ones."""

    text: str
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))


def text_losses(trained: Trained, files: Sequence[Path], length: int) -> Iterator[TextLoss]:
    """The loss on each text, in windows of `length` predicted tokens that don't overlap. Raises UsageError."""
    for file in files:
        id_T = trained.language.read(file)
        if len(id_T) < 2:
            raise UsageError(f"the text {file} has {len(id_T)} tokens, of which none is predicted", code="empty-text")
        total = math.fsum(_window_losses(trained, id_T, length))
        yield TextLoss(str(file), len(id_T) - 1, total / (len(id_T) - 1))


@torch.no_grad()
def _window_losses(trained: Trained, id_T: Tensor, length: int) -> Iterator[float]:
    """The summed loss of several windows at a time."""
    whole = (len(id_T) - 1) // length
    if whole:
        for window_BS in id_T.unfold(0, length + 1, length).split(max(TOKENS // length, 1)):
            yield _summed_loss(trained, window_BS)
    if whole * length < len(id_T) - 1:
        yield _summed_loss(trained, id_T[None, whole * length :])


def _summed_loss(trained: Trained, window_BS: Tensor) -> float:
    window_BS = window_BS.to(trained.model.device)
    logits_BSV = trained.model(input_ids=window_BS[:, :-1], use_cache=False).logits.float()
    finite(logits_BSV, trained.model)
    return float(F.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten(), reduction="sum"))


# -- text ----------------------------------------------------------------------------------------------------


def continuation(trained: Trained, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """What a model writes after a prompt, without it: the likeliest tokens at temperature 0, else drawn ones.

    Ends early at the model's end-of-text token. Raises UsageError for a prompt without tokens.
    """
    given = trained.language.tokenizer(prompt, return_tensors="pt", verbose=False)
    ids = given["input_ids"].long().to(trained.model.device)
    if not ids.shape[-1]:
        raise UsageError("the prompt has no tokens; write at least a word", code="empty-prompt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    ends = trained.model.generation_config.eos_token_id
    pad = ends[0] if isinstance(ends, list) else ends
    with own_random_state(generator(seed, "generation").initial_seed()), uncounted(trained.engine.layers):
        written = trained.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            use_cache=True,
            pad_token_id=pad,
            logits_processor=[lambda _, logits_BV: finite(logits_BV, trained.model)],
            **({"do_sample": False} | sampling),
        )
    text: str = trained.language.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text
