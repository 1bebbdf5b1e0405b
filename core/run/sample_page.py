"""The part of a run's page that shows a sample of the test set: its tokens or images, coloured by expert."""

from collections.abc import Iterator, Mapping, Sequence

from ..contract.run import Run
from ..errors import UsageError
from ..pages.blocks import Block, Note, Section, Words
from ..pages.pictures import png
from .sample import CHOICES, FILE, Sample, SampledLayer, read_sample

TOKENS, PASSAGE, IMAGES = 640, 160, 64  # that are shown: tokens, of one sample at most, and images
SHOWN = 60_000  # choices of all layers that are shown

Choices = list[tuple[int, float]]


def sample_section(run: Run, names: Sequence[str]) -> Section:
    """A sample of the test set by its first experts, in every layer; names: the layers, that to open first first."""
    return Section("Which expert gets what", [*_blocks(run, names)])


def _blocks(run: Run, names: Sequence[str]) -> Iterator[Block]:
    if not (run.folder / FILE).is_file():
        return
    try:
        sample = read_sample(run.folder)
    except UsageError as error:
        yield Note(f"The sample of the test set can't be shown: {error}.")
        return
    layers = {layer.name: layer for layer in sample.layers}
    ordered = {name: layers[name] for name in names if name in layers}
    if sample.images is not None:
        yield from _images(sample, ordered)
    elif sample.texts is not None:
        yield from _texts(sample, sample.texts, ordered)


def _images(sample: Sample, layers: Mapping[str, SampledLayer]) -> Iterator[Block]:
    assert sample.images is not None
    part = sample.part(max(1, min(IMAGES, SHOWN // (CHOICES * max(len(layers), 1)))))
    assert part.images is not None
    kept = {layer.name: layer for layer in part.layers}
    chosen = {name: [*_of_samples(kept[name])] for name in layers}
    if chosen:
        title = f"{len(part.rows)} images of the test set, each framed in the colour of its first expert"
        yield Words(title, [png(image) for image in part.images.numpy()], chosen)


def _of_samples(layer: SampledLayer) -> Iterator[Choices]:
    """Each sample's experts, by their mean gates over its tokens if it has several."""
    if layer.expert.shape[1] == 1:
        yield from _choices(layer)
        return
    for gate_E in layer.gates().tolist():
        pairs = [(expert, gate) for expert, gate in enumerate(gate_E) if gate > 0]
        yield sorted(pairs, key=lambda pair: -pair[1])[:CHOICES]


def _texts(sample: Sample, texts: Sequence[Sequence[str]], layers: Mapping[str, SampledLayer]) -> Iterator[Block]:
    """The beginnings of as many samples as there is room for, at least one."""
    length = max(len(texts[0]), 1)
    fitting = {name: layer for name, layer in layers.items() if layer.expert.shape[1] == length}
    if not fitting or any(len(tokens) != length for tokens in texts):
        return
    choices = sum(layer.expert.shape[2] for layer in fitting.values())
    room = max(1, min(TOKENS, SHOWN // choices))
    part = sample.part(max(1, room // min(length, PASSAGE)), min(PASSAGE, room))
    assert part.texts is not None
    if length > 1:
        tokens = [token for passage in part.texts for token in (*passage, "")]
    else:
        tokens = [f"{token} " for (token,) in part.texts]
    kept = {layer.name: layer for layer in part.layers}
    chosen = {name: [*_apart(kept[name])] for name in fitting}
    what = "passages" if length > 1 else "samples"
    title = f"{len(part.rows)} {what} of the test set, each token in the colour of its first expert"
    yield Words(title, tokens, chosen)


def _apart(layer: SampledLayer) -> Iterator[Choices]:
    """The choices of each token, and none at the end of each sample of several tokens."""
    length = layer.expert.shape[1]
    for at, choices in enumerate(_choices(layer), 1):
        yield choices
        if length > 1 and at % length == 0:
            yield []


def _choices(layer: SampledLayer) -> Iterator[Choices]:
    """The experts and gates of each token."""
    experts, gates = layer.expert.flatten(0, 1).tolist(), layer.gate.flatten(0, 1).tolist()
    for of_token, weights in zip(experts, gates, strict=True):
        yield [(expert, gate) for expert, gate in zip(of_token, weights, strict=True) if expert >= 0]
