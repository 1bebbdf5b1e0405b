"""Other people's training loops: the auxiliary gradient has its scale whatever they do, and nothing stays behind."""

import os
import warnings

import pytest
import torch
from torch import nn

from integrations.test_integrations import ByItems, Wrapped, data, fit, module_of, same, trainer_of
from moe_engine import Engine, adam, expert_mesh, parallelize
from moe_engine.integrations import EngineLoop
from moe_engine.processes import full_tensor
from support import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHT = "switch_aux.weight=3"  # its gradient outweighs the task's, so that a wrong scale shows


def build(plugins="topk,switch_aux", settings=(WEIGHT,)):
    torch.manual_seed(0)
    engine = Engine(plugins, settings, experts=3, top_k=2)
    return engine, nn.Sequential(nn.Linear(3, 6), engine.moe(6, 5, name="moe"), nn.Linear(6, 1))


def by_hand(windows, batch=8, epochs=2):
    """The documented loop; windows: the number of micro-batches of each step of an epoch."""
    engine, net = build()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0)
    x, y = data()
    for _ in range(epochs):
        batches = iter(torch.arange(len(x)).split(batch))
        for window in windows:
            for rows in [next(batches) for _ in range(window)]:
                (((net(x[rows]) - y[rows]).square().mean() + engine.aux_loss()) / window).backward()
                engine.after_backward()
            optimizer.step()
            engine.after_step()
            optimizer.zero_grad()
    return net


class Bare(Wrapped):
    """A model without a loss."""

    def forward(self, x, labels=None):
        return {"logits": self.net(x)}


def elsewhere(outputs, labels, num_items_in_batch=None):
    """A loss that is computed outside the model."""
    loss = (outputs["logits"] - labels).square()
    return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch


# -- transformers' Trainer -----------------------------------------------------------------------------


def trained(wrapped, folder, accumulate, **more):
    from transformers import Trainer

    from moe_engine.integrations.transformers import MoECallback

    engine, net = build()
    trainer = trainer_of(wrapped(net), MoECallback(engine), folder, accumulate, **more)
    if wrapped is Bare:
        trainer.compute_loss_func = elsewhere
    assert isinstance(trainer, Trainer)
    trainer.train()
    return net


@pytest.mark.parametrize("wrapped", [Wrapped, ByItems, Bare])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainers_auxiliary_gradient_is_that_of_the_documented_loop(tmp_path, wrapped, accumulate):
    """With three micro-batches in a step, the last step of an epoch has two."""
    windows = [1] * 8 if accumulate == 1 else [3, 3, 2]
    same(trained(wrapped, tmp_path, accumulate).state_dict(), by_hand(windows).state_dict())


def _rank(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    found = {}
    for wrapped in (Wrapped, ByItems, Bare):
        for average in (True, False):
            for accumulate in (1, 2):
                more = {"average_tokens_across_devices": average, "ddp_backend": "gloo", "num_train_epochs": 1}
                net = trained(wrapped, folder, accumulate, **more)
                found[f"{wrapped.__name__} {average} {accumulate}"] = dict(net.state_dict())
    torch.save(found, f"{folder}/{rank}")


@pytest.mark.long  # both processes import transformers anew
def test_two_processes_have_the_auxiliary_gradient_of_one(tmp_path, free_port):
    """Also where the Trainer multiplies the loss by the number of processes."""
    pytest.importorskip("accelerate")
    on_ranks(_rank, str(tmp_path), free_port)
    found = torch.load(tmp_path / "0", weights_only=True)
    assert len(found) == 12
    for name, state in found.items():
        windows = [1] * 4 if name.endswith("1") else [2] * 2
        expected = by_hand(windows, batch=16, epochs=1).state_dict()  # the losses see both ranks' micro-batches
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


def _spread(rank, folder, port, which):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    net = {"trainer": _with_trainer, "lightning": _with_lightning}[which](folder)
    bank = net[1].experts
    assert bank.exchange is not None and bank.w_in.to_local().shape[0] == 2 - rank  # of three experts
    torch.save({name: full_tensor(tensor) for name, tensor in net.state_dict().items()}, f"{folder}/{rank}")


def _with_trainer(folder):
    from moe_engine.integrations.transformers import MoECallback

    torch.distributed.init_process_group("gloo")
    engine, net = build()
    model = parallelize(engine, Wrapped(net), expert_mesh(2), shard=False).module
    more = {"ddp_backend": "gloo", "num_train_epochs": 1, "optimizers": (adam(model, 1e-2), None)}
    trainer_of(model, MoECallback(engine), folder, **more).train()
    return net


def _with_lightning(folder):
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from moe_engine.integrations.lightning import MoECallback

    engine, net = build()
    module = module_of(net)
    module.configure_model = lambda: parallelize(engine, module, expert_mesh(2), shard=False)
    module.configure_optimizers = lambda: adam(module, 1e-2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # Lightning's shuffles
        callbacks=[MoECallback(engine)],
        **quiet,
    )
    rows = TensorDataset(*data())
    sampler = DistributedSampler(rows, 2, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size=8, sampler=sampler))
    return net


@pytest.mark.long
@pytest.mark.parametrize(("which", "library"), [("trainer", "accelerate"), ("lightning", "lightning.pytorch")])
def test_experts_on_two_ranks_train_as_on_one(tmp_path, free_port, which, library):
    """The trainer shards the data and averages the rest; the experts' exchange is its own affair."""
    pytest.importorskip(library)
    on_ranks(_spread, str(tmp_path), free_port, which)
    expected = by_hand([1] * 4, batch=16, epochs=1).state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"rank {rank}: {key}")


def test_an_interrupted_trainer_leaves_nothing_on_the_model(tmp_path):
    from moe_engine.integrations.transformers import MoECallback

    class Interrupted(Wrapped):
        steps = 0

        def forward(self, x, labels=None):
            Interrupted.steps += 1
            if Interrupted.steps == 4:
                raise KeyboardInterrupt
            return super().forward(x, labels)

    engine, net = build()
    model = Interrupted(net)
    trainer = trainer_of(model, MoECallback(engine), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
    (expected, twin), callback = build(), MoECallback(engine)
    del expected, twin
    trainer_of(model, callback, tmp_path / "again").train()  # the same model, layer and engine in another trainer
    assert engine.step > 10


# -- Lightning -------------------------------------------------------------------------------------------


def manual(net, window, inf_at=()):
    base = type(module_of(net))

    class Manual(base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer, loss = self.optimizers(), super().training_step(batch, index)
            self.manual_backward(loss / window)
            if (index + 1) % window == 0:
                optimizer.step()
                optimizer.zero_grad()

    return Manual()


@pytest.mark.parametrize("window", [1, 2])
def test_lightnings_manual_optimization_has_the_auxiliary_gradient(tmp_path, window):
    pytest.importorskip("lightning")
    from moe_engine.integrations.lightning import MoECallback

    engine, net = build()
    module = manual(net, window)
    fit(module, MoECallback(engine, accumulate=window), tmp_path)
    assert engine.step == 16 // window
    assert not {"manual_backward", "training_step"} & vars(module).keys()
    same(net.state_dict(), by_hand([window] * (8 // window)).state_dict())


@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_lightnings_scaler_skips_is_not_counted(tmp_path, at):
    """The first one, and one in the middle."""
    lightning = pytest.importorskip("lightning.pytorch")
    from torch.utils.data import DataLoader, TensorDataset

    from moe_engine.integrations.lightning import MoECallback

    engine, net = build("topk,loss_free,switch_aux")
    base = type(module_of(net))

    class Overflowing(base):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * torch.inf if index == at else loss

    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    steps = []

    class Noting(MoECallback):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            steps.append(engine.step)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        plugins=[plugin],
        callbacks=[Noting(engine)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=3,
    )
    trainer.fit(Overflowing(), DataLoader(TensorDataset(*data()), batch_size=8))
    assert steps == [step + (step < at) for step in range(8)]


def test_an_interrupted_lightning_trainer_leaves_nothing_on_the_module(tmp_path):
    pytest.importorskip("lightning")
    from moe_engine.integrations.lightning import MoECallback

    engine, net = build()
    module = module_of(net)
    seen = []

    class Stops(MoECallback):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            seen.append("training_step" in vars(module))
            raise LookupError("stop")

    with pytest.raises(LookupError):
        fit(module, Stops(engine), tmp_path)
    assert seen == [True] and "training_step" not in vars(module)


# -- where the engine can't act --------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_model_without_layers_is_named():
    engine, _ = build()
    with pytest.warns(UserWarning, match=r"Linear has no layer of this engine, so 'topk' and 'switch_aux' can't act"):
        EngineLoop(engine).begin(nn.Linear(3, 3))


@pytest.mark.filterwarnings("error")
def test_a_trigger_that_waits_for_an_evaluation_is_named():
    engine, net = build("topk,loss_plateau", ["loss_plateau.on=eval"])
    loop = EngineLoop(engine)
    loop.begin(net)
    loop.add(net(torch.randn(5, 3)).mean()).backward()
    engine.after_backward()
    loop.after_step([torch.optim.SGD(net.parameters(), 0.1)])
    with pytest.warns(UserWarning, match="'loss_plateau' waits for: evaluate"):
        loop.end("evaluate")
    loop.saw(1.0)
    loop.end("evaluate")


@pytest.mark.filterwarnings("error")
def test_a_trigger_that_is_never_asked_is_named_once():
    engine, _ = build("topk,schedule", [])
    for _ in range(99):
        engine.after_step()
    with pytest.warns(UserWarning, match=r"'schedule' can't make any layer grow: engine.due\(loss\) was not called"):
        engine.after_step()
    for _ in range(300):
        engine.after_step()


@pytest.mark.filterwarnings("error")
def test_a_step_that_never_ends_is_said_once():
    engine, _ = build()
    for _ in range(999):
        engine.after_backward()
    with pytest.warns(UserWarning, match=r"1000 backwards without engine.after_step\(\)"):
        engine.after_backward()
    for _ in range(1500):
        engine.after_backward()
