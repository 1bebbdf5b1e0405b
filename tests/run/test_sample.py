"""The sample of the test set that a run keeps: what was routed, and no more than that."""

import tomllib
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from moe_engine import Assignments, Routing, Task, Tokens, assign, hookimpl, option, read_sample, run_page
from moe_engine.cli import main
from moe_engine.contract.routing import Slots, assign_where
from moe_engine.run.config import RunConfig
from moe_engine.run.folder import read_run
from moe_engine.run.sample import BYTES, FILE, Sample, SampledLayer, chosen, shown
from moe_engine.run.training import Training
from moe_engine.run.trees import packed, read_tree, write_tree
from moe_engine.tasks import image_task
from support import on_ranks, refused

SMALL = {"task": "blobs", "steps": 6, "log_every": 6, "no_plugin": ("plots", "html"), "device": "cpu"}
SETTINGS = {"blobs": {"images": 300, "test_images": 400, "size": 8, "dim": 16, "hidden": 16}}
HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


def train(out, plugins=("topk", "switch_aux"), settings=SETTINGS, **more):
    training = Training(RunConfig(plugins=plugins, **{**SMALL, **more}), settings, out)
    return training.run(), training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its model's layer, and what the layer is given for the rows of the sample."""
    run, training = train(tmp_path_factory.mktemp("runs") / "run")
    sample, given = read_sample(run.folder), []
    layer = training.model.moe
    handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    images, labels = (column[sample.rows] for column in training.task.test)
    with torch.no_grad():
        training.model.eval()(images, labels)
    handle.remove()
    return run, sample, layer, given[0], images, labels


def test_its_choices_and_gates_are_those_of_the_logits(trained):
    """topk: the K largest logits, gates softmax over them; computed here with NumPy."""
    _, sample, layer, x_BD, *_ = trained
    logits_BE = x_BD.double().numpy() @ layer.router.weight.detach().double().numpy().T
    best_BK = np.argsort(-logits_BE, axis=1)[:, :2]
    size_BK = np.exp(np.take_along_axis(logits_BE, best_BK, 1))
    (kept,) = sample.layers
    assert kept.expert[:, 0].tolist() == best_BK.tolist()
    np.testing.assert_allclose(kept.gate[:, 0].numpy(), size_BK / size_BK.sum(1, keepdims=True), atol=5e-4)
    gates_BE = kept.gates().numpy()
    assert np.count_nonzero(gates_BE) == 2 * len(best_BK)
    np.testing.assert_allclose(np.take_along_axis(gates_BE, best_BK, 1), kept.gate[:, 0].float().numpy())


def test_it_holds_what_people_see_of_rows_that_are_spread_over_the_test_set(trained):
    run, sample, _, _, images, labels = trained
    assert sample.rows.tolist() == [row * 400 // 256 for row in range(256)]
    assert torch.equal(sample.images, images.view(256, 8, 8)) and sample.texts is None
    assert torch.equal(sample.layers[0].labels[:, 0].long(), labels)
    assert (run.folder / FILE).stat().st_size < 300_000


def test_pixels_of_any_range_and_number_of_channels_are_shown():
    flat = torch.tensor([[0, 4, 8, 16], [1, 2, 3, 4]], dtype=torch.uint8)
    for images, expected in (
        (flat, [[[0, 64], [128, 255]], [[16, 32], [48, 64]]]),
        (flat.view(2, 1, 2, 2), [[[0, 64], [128, 255]], [[16, 32], [48, 64]]]),
        (flat.view(2, 4, 1, 1).expand(2, 4, 2, 2), [[[111, 111], [111, 111]], [[40, 40], [40, 40]]]),
        (flat[:, :3, None, None], [[[[0]], [[128]], [[255]]], [[[32]], [[64]], [[96]]]]),
    ):
        both = images, torch.zeros(2, dtype=torch.long)
        assert image_task(both, both, 2, 4, 4).show(both).tolist() == expected


def hsic(one, other):
    """The unbiased estimator as Song et al. write it, 2012."""
    n = len(one)
    one, other = (gram - np.diag(np.diag(gram)) for gram in (one, other))
    whole = one.sum() * other.sum() / ((n - 1) * (n - 2))
    return ((one * other).sum() + whole - 2 / (n - 2) * (one.sum(0) @ other.sum(0))) / (n * (n - 3))


def test_the_nearest_expert_is_that_of_the_largest_cka(trained):
    _, sample, layer, x_BD, *_ = trained
    with torch.no_grad():
        y_ESO = layer.experts.outputs(x_BD[torch.arange(128) * 256 // 128]).double().numpy()
    gram_ESS = [y_SO @ y_SO.T for y_SO in y_ESO]
    cross_EE = np.array([[hsic(one, other) for other in gram_ESS] for one in gram_ESS])
    cka_EE = cross_EE / np.sqrt(np.outer(np.diag(cross_EE), np.diag(cross_EE)))
    np.fill_diagonal(cka_EE, -np.inf)
    (kept,) = sample.layers
    assert kept.nearest.tolist() == cka_EE.argmax(1).tolist()
    np.testing.assert_allclose(kept.cka.numpy(), cka_EE.max(1), rtol=1e-4)


def test_counts_by_group_are_those_of_the_choices(trained):
    _, sample, *_ = trained
    (kept,) = sample.layers
    expected = np.zeros((10, 8))
    for label, experts in zip(kept.labels[:, 0].tolist(), kept.expert[:, 0].tolist(), strict=True):
        expected[label, experts] += 1
    assert kept.counts(kept.labels, 10).tolist() == expected.tolist()


def test_it_counts_nothing_and_changes_nothing(trained, tmp_path):
    """A run without it has the same weights and records."""
    run, *_ = trained
    other, _ = train(tmp_path / "run", no_sample=True)
    assert other.records == run.records
    files = [(folder / "model.safetensors").read_bytes() for folder in (run.folder, other.folder)]
    assert files[0] == files[1]
    assert not (other.folder / FILE).exists()


def test_the_same_seed_gives_the_same_sample(trained, tmp_path):
    run, *_ = trained
    again, _ = train(tmp_path / "run")
    sums = [packed(read_tree(folder / FILE)).sum() for folder in (run.folder, again.folder)]
    assert sums[0] == sums[1]


# -- left out, damaged, hostile ------------------------------------------------------------------------


def test_a_flag_leaves_it_out_and_is_recorded(tmp_path):
    words = ["--task", "blobs", "--set", "blobs.images=200", "--steps", "2", "--no-plugin", "plots", "--quiet"]
    for name, flags in {"with": [], "without": ["--no-sample"]}.items():
        assert main(["run", *words, *flags, "--out", str(tmp_path / name)]) == 0
        config = tomllib.loads((tmp_path / name / "config.toml").read_text())
        assert config["run"]["no_sample"] is bool(flags)
        assert (tmp_path / name / FILE).exists() is not bool(flags)
        assert ("Which expert gets what" in (tmp_path / name / "report.html").read_text()) is not bool(flags)


def test_a_damaged_sample_is_refused_and_the_report_says_so(trained, tmp_path):
    run, *_ = trained
    content = bytearray((run.folder / FILE).read_bytes())
    content[-1] ^= 1
    for name in ("config.toml", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    (tmp_path / FILE).write_bytes(content)
    with refused("damaged-file", "checksum"):
        read_sample(tmp_path)
    assert "sample of the test set can&#39;t be shown" in run_page(read_run(tmp_path))
    (tmp_path / FILE).unlink()
    with refused("missing-file", FILE):
        read_sample(tmp_path)


LAYER = {"name": "moe", "experts": 4, "expert": torch.zeros(2, 1, 1, dtype=torch.int16), "gate": torch.ones(2, 1, 1)}
WRONG = {
    "expert": {"layers": [{**LAYER, "expert": torch.full((2, 1, 1), 4, dtype=torch.int16)}]},
    "samples": {"layers": [{**LAYER, "expert": torch.zeros(3, 1, 1, dtype=torch.int16)}]},
    "labels": {"layers": [{**LAYER, "labels": torch.zeros(2)}]},
    "nearest": {"layers": [{**LAYER, "nearest": torch.zeros(3)}]},
    "unknown": {"layers": [{**LAYER, "more": 1}]},
    "no layers": {},
    "images": {"layers": [LAYER], "images": torch.zeros(2, 3)},
    "texts": {"layers": [LAYER], "texts": [["a"], [1]]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sample_that_does_not_fit_together_is_refused(tmp_path, name):
    write_tree(tmp_path / FILE, {"sample": 1, "rows": torch.arange(2), **WRONG[name]})
    with refused("damaged-file", FILE):
        read_sample(tmp_path)


def test_another_file_is_not_a_sample(tmp_path):
    write_tree(tmp_path / FILE, {"rows": torch.arange(2)})
    with refused("foreign-file", FILE):
        read_sample(tmp_path)


@attrs.define(eq=False)
class Showy:
    """Sequences of five tokens that go through two layers, and what it shows of them."""

    shows: str = option("hostile", help="what")

    @hookimpl
    def moe_task(self, spec):
        rows = torch.arange(60.0).view(12, 5, 1).expand(-1, -1, 4) / 60
        return Task((rows,), (rows[:7] + 0.01,), Twice, score, show=getattr(self, f"_{self.shows}"))

    def _hostile(self, batch):
        return [[HOSTILE, "a", "\n", "b" * 99, "c"] for _ in batch[0]]

    def _numbers(self, batch):
        return batch[0]

    def _lines(self, batch):
        return ["one text" for _ in batch[0]][1:]

    def _breaks(self, batch):
        raise KeyError("no such word")


class Twice(torch.nn.Module):
    def __init__(self, engine):
        super().__init__()
        self.one, self.other = engine.moe(4, 4, name=HOSTILE), engine.moe(4, 4)

    def forward(self, x):
        return self.other(self.one(x))


def score(model, batch):
    return {"loss": (model(batch[0]) - batch[0]).square().mean()}


def test_texts_of_strangers_are_cut_escaped_and_shown_for_every_layer(tmp_path, install):
    install("task", "showy", Showy)
    run, _ = train(tmp_path / "run", settings={}, task="showy", experts=3)
    sample = read_sample(run.folder)
    assert sample.texts == [[HOSTILE[:32], "a", "\n", "b" * 32, "c"]] * 7
    assert [layer.expert.shape for layer in sample.layers] == [(7, 5, 2)] * 2
    page = run_page(run)
    assert "alert(1)</script>" not in page and "\x1b" not in page and "\\u001b" not in page
    assert page.count(f"<span>{'b' * 32}</span>") == 7 and "7 passages" in page


@pytest.mark.parametrize("shows", ["numbers", "lines", "breaks"])
def test_what_can_not_be_shown_is_refused_before_the_run(tmp_path, install, shows):
    install("task", "showy", Showy)
    with refused("bad-show", "showy"):
        train(tmp_path / "run", settings={"showy": {"shows": shows}}, task="showy")
    assert not (tmp_path / "run").exists()
    Training(RunConfig(**{**SMALL, "task": "showy", "no_sample": True}), {"showy": {"shows": shows}})


# -- any router ----------------------------------------------------------------------------------------


def routing(plan, count, experts=4, **more):
    return Routing(Tokens(torch.zeros(count, 2), (count,)), (), None, plan, experts, 2, **more)


def test_first_choices_come_first_and_dropped_ones_have_gate_0():
    """Token 0 chose 3 before 1, though 1 has the larger gate; capacity dropped the second choice of token 1."""
    tokens = Tokens(torch.zeros(2, 2), (2,))
    plan = assign(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[3, 1], [2, 0]]), tokens)
    plan = attrs.evolve(plan, kept=torch.tensor([True, True, True, False]))
    expert_TK, gate_TK = chosen(routing(plan, 2))
    assert expert_TK.tolist() == [[3, 1], [2, 0]]
    assert gate_TK.tolist() == [[0.25, 0.75], [0.5, 0]]


def test_tokens_may_choose_any_number_of_experts():
    gate_TE = torch.tensor([[0.125, 0.5, 0, 0.25], [0, 0, 0, 0], [0, 0, 0.75, 0]])
    expert_TK, gate_TK = chosen(routing(assign_where(gate_TE, gate_TE > 0, Tokens(torch.zeros(3, 2), (3,))), 3))
    assert expert_TK.tolist() == [[1, 3, 0], [-1, -1, -1], [2, -1, -1]]
    assert gate_TK.tolist() == [[0.5, 0.25, 0.125], [0, 0, 0], [0.75, 0, 0]]


def test_experts_that_choose_tokens_are_ordered_by_gate():
    """Both took token 1 as their first: ranks are the experts', not the token's."""
    token, expert, rank = torch.tensor([[1, 1, 0], [2, 0, 0], [0, 0, 1]])
    on = torch.ones(3, dtype=torch.bool)
    plan = Assignments(token, expert, torch.tensor([0.25, 0.5, 0.75]), rank, on, on)
    expert_TK, gate_TK = chosen(routing(plan, 2))
    assert (expert_TK.tolist(), gate_TK.tolist()) == ([[0, -1], [0, 2]], [[0.75, 0], [0.5, 0.25]])


def test_padding_chooses_nothing_and_mixtures_are_told_by_their_weights():
    tokens = Tokens(torch.zeros(2, 2), (2,), mask=torch.tensor([True, False]))
    expert_TK, _ = chosen(routing(assign(torch.ones(2, 1), torch.tensor([[1], [2]]), tokens), 2))
    assert expert_TK.tolist() == [[1], [-1]]
    combine_GSEn = torch.tensor([[[[0.25, 0.25], [0.0, 0.125], [0.25, 0.125]]]])
    none = assign(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.long), Tokens(torch.zeros(0, 2), (0,)))
    expert_TK, gate_TK = chosen(routing(none, 1, 3, slots=Slots(combine_GSEn, combine_GSEn)))
    assert (expert_TK.tolist(), gate_TK.tolist()) == ([[0, 2, 1]], [[0.5, 0.375, 0.125]])


@pytest.mark.parametrize("router", ["expert_choice", "soft", "relu"])
def test_other_routers_have_a_sample_too(tmp_path, router):
    run, _ = train(tmp_path / "run", (router,), steps=1)
    (layer,) = read_sample(run.folder).layers
    assert layer.expert.shape[:2] == (256, 1) and (layer.expert >= 0).any() and (layer.gate >= 0).all()


def large(samples, tokens, layers, images=None, texts=None):
    choices = torch.zeros(samples, tokens, 8, dtype=torch.int16)
    kept = [SampledLayer(str(at), 8, choices, choices.half()) for at in range(layers)]
    return Sample(torch.arange(samples), images, texts, kept)


def test_a_sample_keeps_as_many_samples_as_fit_or_the_first_tokens_of_one():
    assert len(large(32, 8, 2).fitted().rows) == 32
    many = large(64, 32, 48, texts=[["word"] * 32] * 64).fitted()
    assert BYTES // 2 < many.bytes <= BYTES
    assert many.rows.tolist() == sorted(set(many.rows.tolist())) and many.rows[-1] > 32  # spread, not the first ones
    assert {len(tokens) for tokens in many.texts} == {32}
    long = large(1, 4096, 48, texts=[["word"] * 4096]).fitted()
    assert BYTES // 2 < long.bytes <= BYTES
    assert len(long.texts[0]) == long.layers[0].expert.shape[1] < 4096


def test_large_images_are_kept_small():
    images = torch.zeros(3, 3, 100, 60, dtype=torch.uint8)
    images[:, :, :3, :3] = 90
    task = Task((images,), (images,), None, None, show=lambda batch: batch[0])
    small, texts = shown(task, torch.tensor([0, 2]))
    assert small.shape == (2, 3, 34, 20) and texts is None  # a third
    assert small[0, :, 0, 0].tolist() == [90] * 3 and small.sum() == 2 * 3 * 90


def _sharded(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    train(Path(folder) / "both", precision="fp64", parallel="shard")
    torch.distributed.destroy_process_group()


def test_of_sharded_layers_the_sample_is_that_of_one_process(tmp_path):
    """With the nearest expert of each, for which all weights are needed at once."""
    on_ranks(_sharded, str(tmp_path))
    train(tmp_path / "alone", precision="fp64")
    one, two = (read_sample(tmp_path / name).layers[0] for name in ("alone", "both"))
    assert torch.equal(one.expert, two.expert) and torch.equal(one.nearest, two.nearest)
    torch.testing.assert_close(one.cka, two.cka, rtol=1e-4, atol=1e-4)
