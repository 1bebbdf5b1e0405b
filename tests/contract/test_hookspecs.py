"""Every hook is documented as it is, and has a test of its own, by a plugin from elsewhere."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn

from moe_engine import (
    Bias,
    Engine,
    Experts,
    Family,
    Finding,
    Growth,
    LevelSpec,
    NewExpert,
    Part,
    Router,
    UsageError,
    adam,
    assign,
    hookimpl,
    option,
)
from moe_engine.contract.hookspecs import HOOKS
from moe_engine.pretrained.families import blocks_of
from moe_engine.run.config import RunConfig
from moe_engine.run.training import Training
from moe_engine.tasks.images import image_task

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_the_codes_own_signature(name):
    heading = f"## `{name}({', '.join(inspect.signature(HOOKS[name]).parameters)})`"
    assert heading in (ROOT / "docs" / "hooks.md").read_text("utf-8").splitlines()
    assert inspect.getdoc(HOOKS[name])


def test_the_documentation_has_no_hook_that_the_code_lacks():
    documented = re.findall(r"^## `(moe_\w+)\(", (ROOT / "docs" / "hooks.md").read_text("utf-8"), re.M)
    assert documented == list(HOOKS)


def test_every_hook_has_a_test():
    tests = {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")}
    assert tests == set(HOOKS)


def normal(shape, generator=None):
    return torch.randn(shape, generator=generator)


class EveryOther(Router):
    """Token t goes to expert t mod E; the gate learns."""

    def __init__(self, spec):
        super().__init__()
        self.expert_param("weight", (spec.experts, spec.dim), fresh=normal, role="logit_row")

    @property
    def levels(self):
        return (LevelSpec("expert", self.weight.shape[0], 1),)

    def score(self, tokens):
        return (tokens.x @ self.weight.t(),)

    def select(self, tokens, levels):
        expert_T1 = (torch.arange(len(tokens.x)) % self.weight.shape[0])[:, None]
        probs = levels[0].biased.softmax(-1)
        return probs, assign(probs.gather(-1, expert_T1), expert_T1, tokens)


@attrs.define(eq=False)
class RouterPlugin:
    @hookimpl
    def moe_router(self, spec):
        return EveryOther(spec)


def test_hook_moe_router(install):
    install("router", "every_other", RouterPlugin)
    layer = Engine("every_other", experts=4).moe(3, 5)
    assert layer.route(layer.tokens(torch.randn(8, 3))).load.tolist() == [2, 2, 2, 2]


class Push(Bias):
    def __init__(self, size):
        super().__init__()
        self.expert_buffer("b", torch.arange(float(size)) * 100)
        self.seen = []

    def forward(self):
        return self.b

    def measure(self, level, tokens):
        return {"logits": level.logits.sum(0)}

    def after_step(self, step):
        self.seen.append((step.load.clone(), step.own["logits"].clone()))


@attrs.define(eq=False)
class BiasPlugin:
    @hookimpl
    def moe_bias(self, spec, level):
        return Push(level.size) if level.name == "expert" else None


def test_hook_moe_bias(install):
    install("bias", "push", BiasPlugin)
    engine = Engine("push", experts=4, top_k=1)
    layer = engine.moe(3, 5)
    x = torch.randn(6, 3)
    layer(x).sum().backward()
    engine.after_backward()
    engine.after_step()
    ((load, own),) = layer.biases[0]["push"].seen
    assert load.tolist() == [0, 0, 0, 6]
    torch.testing.assert_close(own, layer.router.score(layer.tokens(x))[0].sum(0).detach())


class Constant(Experts):
    """Expert e answers e, whatever it is asked."""

    def __init__(self, spec):
        super().__init__()
        self.expert_param("value", (spec.experts,), fresh=lambda shape: torch.arange(float(*shape)), role="output")
        self.out = spec.out_dim

    def forward(self, x_ND, counts_E):
        return self.value.repeat_interleave(counts_E)[:, None].expand(-1, self.out)


@attrs.define(eq=False)
class ExpertsPlugin:
    @hookimpl
    def moe_experts(self, spec):
        return Constant(spec)


def test_hook_moe_experts(install):
    install("experts", "constant", ExpertsPlugin)
    layer = Engine("constant", experts=4, top_k=1).moe(3, 5)
    x = torch.randn(6, 3)
    routing = layer.route(layer.tokens(x))
    torch.testing.assert_close(layer(x)[:, 0], routing.gates() @ torch.arange(4.0))


class Memory(Part):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def after_step(self, step):
        self.steps += step.own["twice"].sum()


@attrs.define(eq=False)
class Stateful:
    weight: float = option(1.0, help="coefficient", min=0)

    @hookimpl
    def moe_state(self, spec):
        return Memory()

    @hookimpl
    def moe_measure(self, routing, layer, state):
        return {"twice": 2 * torch.ones(1)}

    @hookimpl
    def moe_aux_loss(self, routing, layer, state):
        return {"one": routing.probs.sum(), "two": state.steps * routing.probs.sum()}

    @hookimpl
    def moe_metrics(self, stats, layer, effects, probe):
        return {
            "twice": stats["stateful.twice"],
            "probed": 0.0 if probe is None else 1.0,
            "say": Finding("said", 1, "because"),
        }


def stateful(install):
    install("loss", "stateful", Stateful)
    engine = Engine("stateful", ["stateful.weight=0.5"], experts=4, top_k=1)
    layer = engine.moe(3, 5)
    for _ in range(3):
        (layer(torch.randn(6, 3)).sum() + engine.aux_loss()).backward()
        engine.after_backward()
        engine.after_step()
    return engine, layer


def test_hook_moe_state(install):
    _, layer = stateful(install)
    assert layer.states["stateful"].steps == 6
    assert "states.stateful.steps" in layer.state_dict()


def test_hook_moe_measure(install):
    engine, _ = stateful(install)
    assert engine.metrics()["moe0"]["twice"] == 6


def test_hook_moe_aux_loss(install):
    """Probabilities sum to one for each of six tokens: terms 6 and 6 * 6, weighted by a half."""
    engine, layer = stateful(install)
    layer(torch.randn(6, 3))
    torch.testing.assert_close(engine.aux_loss(), torch.tensor(0.5 * (6 + 36)))


def test_hook_moe_metrics(install):
    engine, layer = stateful(install)
    got = engine.metrics("train", lambda: layer(torch.randn(6, 3)).sum())["moe0"]
    assert [got["probed"], got["say"].name] == [1.0, "said"]
    assert engine.metrics("train") == {}


@attrs.define(eq=False)
class ReportPlugin:
    @hookimpl
    def moe_report(self, run):
        (run.folder / "said.txt").write_text(run.summary["task"])
        return ["said.txt"]


@attrs.define(eq=False)
class TaskPlugin:
    @hookimpl
    def moe_task(self, spec):
        images = torch.randint(255, (40, 4, 4), dtype=torch.uint8)
        return image_task((images, images[:, 0, 0].long() % 2), (images, images[:, 0, 0].long() % 2), 2, 8, 8)


def test_hook_moe_report(install, tmp_path):
    install("report", "said", ReportPlugin)
    install("task", "noise", TaskPlugin)
    config = RunConfig(task="noise", plugins=("said",), no_plugin=("plots", "html"), epochs=1)
    run = Training(config, {}, tmp_path / "run").run()
    assert (run.folder / "said.txt").read_text() == "noise"


def test_hook_moe_task(install, tmp_path):
    install("task", "noise", TaskPlugin)
    training = Training(RunConfig(task="noise", epochs=1), {}, tmp_path / "run")
    assert training.total_steps == 1
    assert isinstance(training.model, nn.Module)


@attrs.define(eq=False)
class FamilyPlugin:
    @hookimpl
    def moe_family(self, model):
        return Family(router="scores", experts="bank")


def test_hook_moe_family(install):
    """The plugin of a model's type is asked; its blocks are the modules that have both parts."""
    install("family", "noise", FamilyPlugin)
    model = nn.ModuleDict({"scores": nn.Linear(4, 2), "bank": nn.Linear(4, 4)})
    model.config = SimpleNamespace(model_type="noise")
    (block,) = blocks_of(model)
    assert block.family.name == "noise"
    assert block.router is model["scores"] and block.experts is model["bank"]


@attrs.define(eq=False)
class CheckPlugin:
    limit: int = option(3, help="most experts", min=1)

    @hookimpl
    def moe_check(self, setup):
        return f"{sorted(setup.plugins)[0]} takes {self.limit} experts" if setup.spec.experts > self.limit else None


def test_hook_moe_check(install):
    install("metric", "aaa", CheckPlugin)
    install("metric", "bbb", CheckPlugin)
    Engine("aaa,bbb", experts=3).moe(3, 4)
    with pytest.raises(UsageError, match="aaa takes 3 experts; aaa takes 2 experts"):
        Engine("aaa,bbb", ["bbb.limit=2"], experts=4).moe(3, 4)


@attrs.define(eq=False)
class Eager:
    """Grows at every second step, and keeps its own account."""

    @hookimpl
    def moe_growth(self, history, memory):
        memory["steps"] = memory.get("steps", 0) + 1
        assert memory["steps"] == history.step
        if history.step % 2:
            return None
        return Growth(history.layers[0].name, (history.busiest(history.layers[0]),), why=f"loss {history.loss}")


@attrs.define(eq=False)
class Never:
    @hookimpl
    def moe_growth(self, history, memory):
        memory["asked"] = history.eval_loss
        return []


def one_step(engine, layer, optimizer):
    layer(torch.randn(9, 4)).sum().backward()
    engine.after_backward()
    optimizer.step()
    engine.after_step()
    optimizer.zero_grad()


def test_hook_moe_growth(install):
    install("growth", "eager", Eager)
    install("growth", "never", Never)
    engine = Engine("never,eager", experts=3)
    layer = engine.moe(4, 8, name="one")
    optimizer = adam(layer, 1e-3)
    one_step(engine, layer, optimizer)
    assert engine.due(1.0) == []
    one_step(engine, layer, optimizer)
    (wanted,) = engine.due(torch.tensor(2.0, requires_grad=True), eval_loss=3.0)
    assert wanted == Growth("one", (int(layer.load_since_growth.argmax()),), why="eager: loss 2.0")
    assert engine.triggers.memory == {"never": {"asked": 3.0}, "eager": {"steps": 2}}
    assert engine.due(float("nan")) == []


@attrs.define(eq=False)
class Halves:
    @hookimpl
    def moe_new_expert(self, parent, growth, index, fresh, roles, generator):
        assert (index, roles["router.weight"], roles["experts.w_out"]) == (3, "logit_row", "output")
        assert growth.why == "because"
        noise = torch.randn(1, generator=generator)
        return NewExpert({name: row / 2 + 0 * noise for name, row in parent.items()})


def test_hook_moe_new_expert(install):
    install("initializer", "halves", Halves)
    engine = Engine("halves", experts=3)
    layer = engine.moe(4, 8, name="one")
    engine.grow(Growth("one", (1,), why="because"))
    for weight in (layer.router.weight, layer.experts.w_in, layer.experts.w_out):
        torch.testing.assert_close(weight[3], weight[1] / 2)
