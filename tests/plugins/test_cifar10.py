"""How CIFAR-10's images are augmented in training."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from moe_engine import Engine, TaskSpec, UsageError
from moe_engine.plugins.tasks import cifar10
from moe_engine.plugins.tasks.cifar10 import Cifar10
from moe_engine.run.config import RunConfig
from moe_engine.run.folder import old_folder
from moe_engine.run.training import Stopped, Training
from moe_engine.tasks import image_task


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """48 images for training and 16 for testing, all pixels of which differ from black."""
    images, labels = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    splits = (images[:48], labels[:48]), (images[48:], labels[48:])
    monkeypatch.setattr(cifar10, "load_cifar10", lambda data_dir: splits)


def changed(images, labels, **options):
    return Cifar10(**options).moe_task(TaskSpec()).augment((images, labels))


def test_nothing_changes_unless_it_is_asked_for():
    assert Cifar10().moe_task(TaskSpec()).augment is None


@pytest.mark.parametrize(("centred", "lowest"), [(False, 0.0), (True, -1.0)])
def test_pixels_may_lie_around_zero(centred, lowest):
    """What the layer gets of a black, a grey and a white image is from 0 to 1, or from -1 to 1."""
    task = Cifar10(model="direct", hidden=4, centred=centred).moe_task(TaskSpec())
    model = task.model(Engine("topk", experts=2))
    seen = []
    model.moe.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model(torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None].expand(3, 3 * 32 * 32), torch.arange(3))
    expected = torch.tensor([lowest, lowest + 0.2 * (1 - lowest), 1.0])
    torch.testing.assert_close(seen[0], expected[:, None].expand_as(seen[0]))


def places(shown, image):
    """Each (y, x, mirrored) at which torchvision's own pad, crop and flip give what is shown."""
    padded = v2.functional.pad(image, 4)
    crops = {(y, x): v2.functional.crop(padded, y, x, 32, 32) for y in range(9) for x in range(9)}
    both = {
        (*at, flip): v2.functional.horizontal_flip(crop) if flip else crop
        for at, crop in crops.items()
        for flip in (0, 1)
    }
    return [at for at, one in both.items() if torch.equal(one, shown)]


def test_each_image_has_a_crop_and_a_coin_of_its_own():
    images, labels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40)
    shown, same = changed(images, labels, augment="standard")
    assert torch.equal(labels, same)
    found = [places(one, image) for one, image in zip(shown, images, strict=True)]
    assert all(len(at) == 1 for at in found)
    assert len({at[0] for at in found}) > 20


def test_windows_and_coins_are_uniform():
    """8100 images that are 0 but for one pixel, seen at 81 places about 100 times each, half of them mirrored."""
    images = torch.zeros(8100, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 4] = 1
    shown, _ = changed(images, torch.zeros(8100, dtype=torch.long), augment="standard")
    place = shown[:, 0].flatten(1).argmax(1)
    y, x = place // 32, place % 32  # x is 0 to 8, or mirrored 23 to 31
    shares = [100 * 81 / 9] * 9
    assert (y - 12).bincount().tolist() == pytest.approx(shares, abs=4 * 30)
    assert torch.where(x > 8, 31 - x, x).bincount().tolist() == pytest.approx(shares, abs=4 * 30)
    assert int((x > 8).sum()) == pytest.approx(4050, abs=4 * 45)


def test_a_mixed_batch_has_the_shares_of_its_pixels_as_labels():
    """A image of class c is c everywhere, so that what is in it is what its label is to say."""
    labels = torch.arange(10)
    images = labels.to(torch.uint8).view(10, 1, 1, 1).expand(10, 3, 32, 32).contiguous()
    shown, shares = changed(images, labels, cutmix=1)
    expected = torch.stack([F.one_hot(one[0].long().flatten(), 10).float().mean(0) for one in shown])
    torch.testing.assert_close(shares, expected)
    assert bool(((shares > 0).sum(1) == 2).all())


def test_half_of_the_batches_are_mixed():
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2)
    change = Cifar10(cutmix=0.5).moe_task(TaskSpec()).augment
    mixed = sum(change((images, labels))[1].dim() == 2 for _ in range(400))
    assert mixed == pytest.approx(200, abs=4 * 10)


def test_mixed_labels_are_scored_by_their_shares():
    """-(0.7 ln p_0 + 0.3 ln p_2) with p = softmax(2, 0, 1); the answer, 0, is the larger share's class."""
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    seen = []

    class Fixed(torch.nn.Module):
        def forward(self, images, labels):
            seen.append(labels.tolist())
            return logits

    batch = (torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[0.7, 0.0, 0.3]]))
    score = image_task(batch, batch, 3, 4, 4).score(Fixed(), batch)
    p = logits.exp() / logits.exp().sum()
    assert float(score["loss"]) == pytest.approx(-float(0.7 * p[0, 0].log() + 0.3 * p[0, 2].log()))
    assert (int(score["correct"]), seen) == (1, [[0]])


RUN = {"task": "cifar10", "epochs": 2, "batch_size": 16, "log_every": 2, "no_plugin": ("plots", "html")}
SETTINGS = {"cifar10": {"model": "direct", "hidden": 4, "augment": "standard", "cutmix": 0.5}}


def records(training):
    run = training.run()
    return run.records, {**run.summary, "seconds": None, "speed": None}


def test_a_run_that_changes_images_repeats_and_goes_on_bit_for_bit(tmp_path):
    straight = records(Training(RunConfig(**RUN), SETTINGS, tmp_path / "a"))
    assert straight == records(Training(RunConfig(**RUN), SETTINGS, tmp_path / "b"))
    plain = {"cifar10": {**SETTINGS["cifar10"], "augment": "none"}}
    assert straight != records(Training(RunConfig(**RUN), plain, tmp_path / "c"))
    cut = Training(RunConfig(**RUN), SETTINGS, tmp_path / "cut", listener=lambda record: setattr(cut, "stop", True))
    with pytest.raises(Stopped):
        cut.run()
    assert 0 < cut.step < 6
    assert straight == records(Training(*old_folder(tmp_path / "cut"), tmp_path / "cut", resumed=True))


@pytest.mark.parametrize(("option", "value"), [("augment", "strong"), ("cutmix", 1.5)])
def test_what_makes_no_sense_is_refused(option, value):
    with pytest.raises(UsageError, match=f"task 'cifar10': '{option}' must be"):
        Training(RunConfig(task="cifar10"), {"cifar10": {option: value}})
