from pathlib import Path

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from moe_engine import (
    PretrainedLM,
    Task,
    UsageError,
    adopt,
    all_reduce_sum,
    at_least_fp32,
    hookimpl,
    option,
    train_only,
    training_memory,
    upcycle,
)

TOKENS, FEW_TOKENS = 4096, 1024  # of one forward in evaluation, at most; where memory is scarce


@attrs.define(eq=False)
class CausalLM:
    """Fine-tune a causal language model of transformers.

    The model is read from a local folder, as safetensors or GGUF; nothing is downloaded, and neither code nor pickled
    weights are loaded. The engine decides in the blocks of a mixture as `adopt` lets it; of a dense model, blocks are
    upcycled first. Weights are trained in float32. Loss: mean cross-entropy of the next token in nats; perplexity = exp
    of it, overall and for each text. The last tenth of each text is for testing; test windows do not overlap.

    Sources: Komatsuzaki et al., 2022 (Sparse Upcycling); Hu et al., 2022 (LoRA); Chen et al., 2016 (gradient
    checkpointing).
    """

    model: str | None = option(None, help="folder of the model, with config.json, tokenizer and weights; required")
    file: str | None = option(
        None, help="UTF-8 texts, comma-separated, paths or names under --data-dir; each is a domain; required"
    )
    length: int | None = option(None, help="tokens in a window; unset: 512, or what the model takes", min=2)
    stride: int | None = option(None, help="tokens between the starts of training windows; unset: length", min=1)
    train: str = option(
        "all",
        help="weights to train: all, or those of the experts and routers, or of the routers",
        choices=("all", "moe", "router"),
    )
    lora: int | None = option(None, help="rank of adapters (PEFT) on the linear layers that are frozen", min=1)
    gradient_checkpointing: bool = option(False, help="repeat each layer's forward in backward, to save memory")
    upcycle: int | None = option(None, help="experts to make of each dense feed-forward block; for dense models", min=2)
    top_k: int = option(2, help="experts per token of upcycled blocks", min=1)
    layers: str = option("every 2", help="layers to upcycle: all, every N, or indices such as 1 3 5")

    @staticmethod
    def trial_options(folder, dim, hidden):
        """Write a tiny mixture and a text for the conformance tests."""
        from moe_engine.testing import tiny_checkpoint

        tiny_checkpoint(folder / "model", "mixtral", num_hidden_layers=2)
        (folder / "text.txt").write_text(" ".join(str(i * i) for i in range(2_000)), "utf-8")
        return {"model": str(folder / "model"), "file": str(folder / "text.txt"), "length": 16}

    @hookimpl
    def moe_check(self, setup):
        if setup.task is None:
            return None
        if self.model is None or self.file is None:
            missing = "model" if self.model is None else "file"
            what = {"model": "the folder of a model", "file": "a text"}[missing]
            return f"causal_lm needs {what}; set causal_lm.{missing}"
        if self.lora and self.train == "all":
            return "causal_lm.lora adapts frozen layers, but all are trained; set causal_lm.train to moe or router"
        return None

    @hookimpl
    def moe_task(self, spec):
        language = PretrainedLM.open(self.model)
        self._check_kind(language)
        length = language.window(self.length)
        rows = min(spec.batch_size, (FEW_TOKENS if self.gradient_checkpointing else TOKENS) // length) or 1
        needed = training_memory(
            language,
            train=self.train,
            tokens=spec.batch_size * length,
            probed=rows * length,
            device=spec.device,
            recompute=self.gradient_checkpointing,
            experts=self.upcycle or 0,
            layers=self._layers(),
            top_k=self.top_k,
        )
        advice = ["lower --batch-size or causal_lm.length", "set causal_lm.gradient_checkpointing=true"]
        needed.check(spec.device, [*advice, "train less with causal_lm.train"])
        train, test, names = self._windows(language, length, Path(spec.data_dir))
        return Task(
            train=train,
            test=test,
            model=lambda engine: self.language_model(engine, language)[0],
            score=_next_token,
            perplexity=True,
            tokens=length,
            measures=(lambda: TextPerplexity(names)) if len(names) > 1 else None,
            most_rows=rows,
            note=f"memory: {needed}",
            show=lambda batch: [language.words(window) for window in batch[0][:, :-1]],
        )

    def language_model(self, engine, language=None):
        """(the model, where it was opened, tokens in a window), without reading the texts."""
        language = language or PretrainedLM.open(self.model)
        model = language.load()
        if self.upcycle:
            upcycle(engine, model, experts=self.upcycle, top_k=self.top_k, layers=self._layers())
        else:
            adopt(engine, model)
        train_only(engine, model, self.train)
        if self.lora:
            _adapt(engine, model, self.lora)
        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        return model, language, language.window(self.length)

    def _check_kind(self, language):
        kind = language.config.model_type
        if language.is_mixture and self.upcycle:
            message = f"{self.model} ({kind}) has experts already; remove causal_lm.upcycle"
            raise UsageError(message, code="already-a-mixture")
        if not language.is_mixture and not self.upcycle:
            message = f"{self.model} ({kind}) has no experts; let causal_lm.upcycle=8 make some of its dense blocks"
            raise UsageError(message, code="dense-model")

    def _layers(self):
        words = self.layers.split()
        return [int(word) for word in words] if all(word.isdecimal() for word in words) else self.layers

    def _windows(self, language, length, data_dir):
        """Training and test windows of all texts, each with the index of its text, and the names of the texts."""
        stride = self.stride or length
        paths = [_found(name.strip(), data_dir) for name in self.file.split(",") if name.strip()]
        names = [path.stem for path in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            message = f"two texts of causal_lm.file are named {twice}; rename one, as reports call them by their names"
            raise UsageError(message, code="duplicate-text")
        columns = {"train": [], "test": []}
        for number, path in enumerate(paths):
            id_T = language.read(path)
            train, test = id_T.split([len(id_T) - len(id_T) // 10, len(id_T) // 10])
            if len(test) <= length:
                need = f"windows of causal_lm.length={length} need {10 * (length + 1)}"
                message = f"the text {path} has {len(id_T)} tokens; {need}; name a longer text or lower it"
                raise UsageError(message, code="text-too-short")
            for split, ids, step in (("train", train, stride), ("test", test, length)):
                window_NS = ids.unfold(0, length + 1, step)
                columns[split].append((window_NS, torch.full((len(window_NS),), number)))
        train, test = (tuple(map(torch.cat, zip(*columns[split], strict=True))) for split in columns)
        return train, test, names


def _found(name, data_dir):
    for path in (Path(name), data_dir / name):
        if path.exists():
            return path
    why = f"there is no text file {name}, neither at that path nor in {data_dir}; set causal_lm.file"
    raise UsageError(why, code="missing-file")


def _next_token(model, batch):
    window_BS, text_B = batch
    logits_BSV = at_least_fp32(model(input_ids=window_BS[:, :-1], use_cache=False).logits)
    loss_T = F.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten(), reduction="none")
    if model.training:
        return {"loss": loss_T.mean()}
    return {"loss": loss_T.mean(), "predicted": loss_T.view(len(window_BS), -1).mean(1), "true": text_B}


class TextPerplexity:
    """exp of the mean loss over the windows of each text, of all ranks."""

    def __init__(self, names):
        self.names = names
        self.loss_D, self.count_D = torch.zeros(len(names)), torch.zeros(len(names))

    def to(self, device):
        self.loss_D, self.count_D = self.loss_D.to(device), self.count_D.to(device)
        return self

    def update(self, loss_B, text_B):
        self.loss_D.index_add_(0, text_B, loss_B.to(self.loss_D.dtype))
        self.count_D += text_B.bincount(minlength=len(self.names))

    def compute(self):
        perplexity_D = (all_reduce_sum(self.loss_D) / all_reduce_sum(self.count_D)).exp()
        return {f"perplexity.{name}": value for name, value in zip(self.names, perplexity_D, strict=True)}


def _adapt(engine, model, rank):
    """Put adapters on the linear maps that are frozen, apart from the engine's layers and the head."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("causal_lm.lora needs PEFT; pip install peft", code="not-installed") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for parameter in trained:  # which the injection has frozen
        parameter.requires_grad_(True)
