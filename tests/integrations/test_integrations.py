"""The callbacks for PyTorch Lightning and transformers' Trainer."""

import copy

import pytest
import torch
from torch import nn

from moe_engine import Engine, Growth, adam
from moe_engine.integrations import EngineLoop

PLUGINS = "saturation,switch_aux,schedule,clone"
SETTINGS = ["schedule.every=4", "schedule.max_experts=5"]
ROWS = 64


def build(settings=SETTINGS):
    torch.manual_seed(0)
    engine = Engine(PLUGINS, settings, experts=3, top_k=2)
    net = nn.Sequential(nn.Linear(3, 6), engine.moe(6, 5, name="moe"), nn.Linear(6, 1))
    return engine, net


def data():
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True)


def by_hand(accumulate, batch=8, epochs=2):
    """The documented loop, which the callbacks must reproduce."""
    engine, net = build()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0)
    x, y = data()
    number = 0
    for _ in range(epochs):
        for rows in torch.arange(ROWS).split(batch):
            loss = (net(x[rows]) - y[rows]).square().mean()
            ((loss + engine.aux_loss()) / accumulate).backward()
            engine.after_backward()
            number += 1
            if number % accumulate == 0:
                optimizer.step()
                engine.after_step()
                optimizer.zero_grad()
                for growth in engine.due(loss):
                    engine.grow(growth, optimizer)
    return engine, net


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-6, msg=name)


# -- transformers ----------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model as transformers' Trainer takes it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        y = self.net(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


class ByItems(Wrapped):
    """A model that divides its loss by the items of all micro-batches, as language models do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **_):
        y = self.net(x)
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": (y - labels).square().sum() / items, "logits": y}


def trainer_of(model, callback, folder, accumulate=1, optimizers=(None, None), **more):
    from transformers import Trainer, TrainingArguments

    more = {"save_strategy": "no", "num_train_epochs": 2, **more}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0,
        logging_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        train_sampling_strategy="sequential",
        **more,
    )
    x, y = data()
    rows = [{"x": one, "labels": two} for one, two in zip(x, y, strict=True)]
    data_sets = {"train_dataset": rows, "eval_dataset": rows[:16]}
    return Trainer(model, arguments, **data_sets, callbacks=[callback], optimizers=optimizers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("wrapped", [Wrapped, ByItems])
def test_transformers_trainer_does_what_the_documented_loop_does(tmp_path, accumulate, wrapped):
    pytest.importorskip("accelerate")
    from moe_engine.integrations.transformers import MoECallback

    engine, net = build()
    trainer = trainer_of(wrapped(net), MoECallback(engine), tmp_path, accumulate)
    trainer.train()
    expected, other = by_hand(accumulate)
    assert [one.after for one in engine.growths] == [one.after for one in expected.growths] != []
    same(net.state_dict(), other.state_dict())
    logged = [one for one in trainer.state.log_history if "moe/net.1/cv" in one]
    assert logged
    metrics = trainer.evaluate()
    assert metrics["eval_moe/net.1/cv"] >= 0
    assert engine.step == expected.step


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_resumes_at_the_number_of_experts_it_was_saved_with(tmp_path):
    pytest.importorskip("accelerate")
    from moe_engine.integrations.transformers import MoECallback

    engine, net = build()
    trainer_of(Wrapped(net), MoECallback(engine), tmp_path, save_strategy="steps", save_steps=6).train()
    again, other = build()
    trainer = trainer_of(Wrapped(other), MoECallback(again), tmp_path, save_strategy="steps", save_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.step == engine.step == 16
    assert [one.step for one in again.growths] == [one.step for one in engine.growths]
    same(net.state_dict(), other.state_dict())


# -- Lightning ---------------------------------------------------------------------------------------------


def module_of(net):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            x, y = batch
            return (self.net(x) - y).square().mean()

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val_loss", (self.net(x) - y).square().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0)

    return Module()


def fit(module, callback, folder, accumulate=1, epochs=2, path=None):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=3,
        callbacks=[callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )
    trainer.fit(module, loader, loader, ckpt_path=path)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_does_what_the_documented_loop_does(tmp_path, accumulate):
    module = module_of((pair := build())[1])
    from moe_engine.integrations.lightning import MoECallback

    engine, net = pair
    trainer = fit(module, MoECallback(engine), tmp_path, accumulate)
    expected, other = by_hand(accumulate)
    assert [one.after for one in engine.growths] == [one.after for one in expected.growths] != []
    same(net.state_dict(), other.state_dict())
    assert trainer.callback_metrics["moe/net.1/cv"] >= 0
    assert trainer.callback_metrics["eval_moe/net.1/cv"] >= 0
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_at_the_number_of_experts_it_was_saved_with(tmp_path):
    module = module_of((pair := build())[1])
    from moe_engine.integrations.lightning import MoECallback

    fit(module, MoECallback(pair[0]), tmp_path)
    again, other = build()
    fit(module_of(other), MoECallback(again), tmp_path / "again", path=str(tmp_path / "epoch=0.ckpt"))
    assert again.step == pair[0].step == 16
    assert again.growths == pair[0].growths
    same(pair[1].state_dict(), other.state_dict())


def test_a_trainers_extra_aux_loss_counts_once():
    """A user who also adds it, next to the callback, changes nothing."""
    (engine, net), (twin, copied) = build(), build()
    x, y = data()
    ((net(x) - y).square().mean() + engine.aux_loss()).backward()
    ((copied(x) - y).square().mean() + twin.aux_loss() + twin.aux_loss()).backward()
    for one, two in zip(net.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert copy.deepcopy(engine).layers == []
    assert (Growth("moe").parents, adam(net, 1e-3).defaults["fused"]) == ((), True)


def test_a_growth_at_a_log_point_loses_no_numbers():
    engine, net = build(["schedule.every=1", "schedule.max_experts=4"])
    loop, optimizer = EngineLoop(engine), adam(net, 1e-3)
    x, y = data()
    for expected in (4, 4):
        loop.add((net(x) - y).square().mean()).backward()
        engine.after_backward()
        optimizer.step()
        loop.after_step([optimizer])
        assert net[1].spec.experts == expected
        assert loop.metrics("train")["moe/moe/cv"] >= 0
        optimizer.zero_grad()
    assert loop.metrics("train") == {}
