"""Open a checkpoint folder of transformers: its own files alone, as safetensors or GGUF, and no code from it."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError, listed
from ..files import INDEX, read_file

WEIGHTS, CONFIG, ADAPTER = "*.safetensors", "config.json", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
KEYS = 3  # weights named in a message
LARGE = 2e9  # bytes of weights whose reading shows a bar on a terminal
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_model(folder: Path, dtype: str = "auto") -> Any:
    """The language model in a folder, in eval mode on the CPU. dtype: "auto" keeps the precision of the file.

    Pickles, code of the folder's own, adapters and incomplete weights are refused. Raises UsageError.
    """
    gguf = gguf_of(folder)
    named = {} if gguf is None else {"gguf_file": gguf.name}
    with reading(folder, "the model", bar=_is_large(folder) and sys.stderr.isatty()) as transformers:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, in a sentence
            **LOCAL,
            **named,
        )
    for problem, kind in (("lacks", "missing_keys"), ("has other sizes of", "mismatched_keys")):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in report[kind]):
            names = [*keys[:KEYS], *([f"{len(keys) - KEYS} more"] if len(keys) > KEYS else [])]
            sentence = f"{folder} {problem} weights of its {type(model).__name__}: {listed(names)}"
            raise UsageError(f"{sentence}; copy the whole checkpoint", code="incomplete-checkpoint")
    for name, weight in model.named_parameters():
        wide = weight.numel() and weight.dtype.itemsize > 1  # torch has no minimum of float8
        if wide and not all(end.isfinite() for end in weight.detach().aminmax()):
            message = f"{folder} has numbers that are not finite in {name}; copy the checkpoint again"
            raise UsageError(message, code="damaged-checkpoint")
    return model.eval()


def finite(outputs: Tensor, model: Any) -> Tensor:
    """The outputs of a model. Raises UsageError if some are not finite, as those of damaged weights may be."""
    if not outputs.isfinite().all():
        message = f"{type(model).__name__} computes numbers that are not finite; copy its checkpoint again"
        raise UsageError(message, code="damaged-checkpoint")
    return outputs


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder. Raises UsageError."""
    gguf = gguf_of(folder)
    named = {} if gguf is None else {"gguf_file": gguf.name}
    with reading(folder, "the tokenizer") as transformers:
        return transformers.AutoTokenizer.from_pretrained(folder, **LOCAL, **named)


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder, or None if it holds safetensors. Raises UsageError for any other folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; name one with a checkpoint", code="no-checkpoint")
    if (folder / ADAPTER).exists():
        sentence = f"{folder} holds an adapter; merge it into its model, save that and name its folder"
        raise UsageError(sentence, code="not-a-checkpoint")
    ggufs = sorted(folder.glob("*.gguf"))
    if any(folder.glob(WEIGHTS)):
        if not (folder / CONFIG).exists():
            raise UsageError(f"{folder} has weights, but no {CONFIG}; copy the whole checkpoint", code="no-checkpoint")
        _check_config(folder)
        _check_index(folder)
        return None
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = listed(path.name for path in ggufs)
        raise UsageError(f"{folder} holds several GGUF files, {names}; leave one in it", code="several-checkpoints")
    if any(path for kind in PICKLES for path in folder.glob(kind)):
        sentence = f"{folder} holds pickled weights alone, which may run code; save the model as safetensors"
        raise UsageError(sentence, code="pickled-checkpoint")
    raise UsageError(f"{folder} holds no weights: no safetensors and no GGUF file", code="no-checkpoint")


def _check_config(folder: Path) -> None:
    """Refuse a config that makes transformers read other weights, or download kernels."""
    settings = dict(_settings(_json(folder / CONFIG)))
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(settings.get(name, "")):
            sentence = f"{folder / CONFIG} asks for code from elsewhere: {name} is {settings[name]!r}; remove it"
            raise UsageError(sentence, code="code-in-checkpoint")
    _check_names(folder / CONFIG, [str(settings[name]) for name in ("transformers_weights",) if settings.get(name)])


def _check_index(folder: Path) -> None:
    """Refuse an index that names other files than safetensors of this folder."""
    if (folder / INDEX).exists():
        named = _json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise UsageError(f"{folder / INDEX} holds no weight_map; copy the whole checkpoint", code="damaged-file")
        _check_names(folder / INDEX, [str(name) for name in named.values()])


def _check_names(source: Path, names: list[str]) -> None:
    for name in sorted(set(names)):
        if Path(name).name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
            sentence = f"{source} names the weights {name!r}, which is not a safetensors file of its folder"
            raise UsageError(sentence, code="pickled-checkpoint")


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} can't be read as JSON ({error})", code="damaged-file") from error
    if not isinstance(read, dict):
        raise UsageError(f"{path} is not a JSON object; copy the whole checkpoint", code="damaged-file")
    return read


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of a config and of the configs inside it."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _settings(value)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        sentence = "transformers is not installed; pip install 'moe-engine[transformers]'"
        raise UsageError(sentence, code="not-installed") from error
    return transformers


@contextmanager
def reading(folder: Path, what: str, bar: bool = False) -> Iterator[Any]:
    """transformers, while it reads a folder: without remarks, and with a sentence for whatever it raises.

    what: "the model", say. bar: show its progress bar.
    """
    transformers = _transformers()
    with quietly(transformers, bar), _refusing(folder, what):
        yield transformers


def _is_large(folder: Path) -> bool:
    """Whether reading the weights takes seconds."""
    return sum(path.stat().st_size for kind in (WEIGHTS, "*.gguf") for path in folder.glob(kind)) > LARGE


@contextmanager
def quietly(transformers: Any, shown: bool = False) -> Iterator[None]:
    """Without transformers' remarks and warnings inside, and without its progress bar unless it is `shown`."""
    logging = transformers.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    if not shown:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _refusing(folder: Path, what: str) -> Iterator[None]:
    """Say in a sentence why transformers can't read a folder, whatever it raises over a damaged one."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and "gguf" in str(error).lower():
            sentence = f"{folder} holds a GGUF file, which needs gguf; pip install gguf"
            raise UsageError(sentence, code="not-installed") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
        raise UsageError(f"transformers can't load {what} of {folder} ({why})", code="unreadable-checkpoint") from error
