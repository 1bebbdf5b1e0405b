"""Built-ins ask others by hook or effect, so a third party's plugin is treated like one of ours."""

import attrs
import pytest
import torch

from moe_engine import Bias, Engine, Growth, NewExpert, Traits, UsageError, hookimpl, option


class Zero(Bias):
    def __init__(self, size):
        super().__init__()
        self.expert_buffer("b", torch.zeros(size), new=0.0)

    def forward(self):
        return self.b


@attrs.define(eq=False)
class Leveller:
    """A bias that claims to make all loads equal."""

    traits = Traits(requires=("logits", "load"), effects=("equal_load",))

    @hookimpl
    def moe_bias(self, spec, level):
        return Zero(level.size)


@attrs.define(eq=False)
class Copier:
    """An initializer that copies the parent's router row."""

    traits = Traits(effects=("copies_router_row",))

    @hookimpl
    def moe_new_expert(self, parent, fresh):
        return NewExpert(parent or fresh)


@attrs.define(eq=False)
class Silencer:
    """An initializer whose experts start with an output of 0."""

    traits = Traits(effects=("silent_start",))

    @hookimpl
    def moe_new_expert(self, fresh):
        return NewExpert(fresh)


@attrs.define(eq=False)
class Sharpener:
    """A loss on the entropy of the choice."""

    traits = Traits(requires=("probs",), effects=("token_entropy",))

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.mean(routing.probs.square().sum(-1))


@attrs.define(eq=False)
class Evener:
    """A loss on the variance of the mean probabilities."""

    traits = Traits(requires=("probs",), effects=("mean_probs_cv2",))

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.mean(routing.probs).square().sum()


@attrs.define(eq=False)
class Dealer:
    """A metric that stands for whatever sends exact copies different tokens."""

    traits = Traits(effects=("parts_copies",))

    @hookimpl
    def moe_metrics(self, stats):
        return {}


@attrs.define(eq=False)
class Balancer:
    """A balance loss: it needs a load that training can shift."""

    traits = Traits(requires=("probs", "load"), balanced=1.0)
    weight: float = option(0.01, help="coefficient", min=0)

    @hookimpl
    def moe_aux_loss(self, routing):
        return routing.experts * (routing.load / routing.load.sum() * routing.mean(routing.probs)).sum()


@attrs.define(eq=False)
class Grower:
    """A trigger that never fires."""

    @hookimpl
    def moe_growth(self, history):
        return Growth("moe", parents=(0,)) if history.step < 0 else None


STRANGERS = {
    "leveller": ("bias", Leveller),
    "copier": ("initializer", Copier),
    "silencer": ("initializer", Silencer),
    "sharpener": ("loss", Sharpener),
    "evener": ("loss", Evener),
    "dealer": ("metric", Dealer),
    "balancer": ("loss", Balancer),
    "grower": ("growth", Grower),
}


@pytest.fixture
def built(install):
    """built(plugins, settings): an engine with one layer, the strangers above installed."""
    for name, (kind, cls) in STRANGERS.items():
        install(kind, name, cls)

    def build(plugins, settings=(), **spec):
        engine = Engine(f"topk,{plugins}", settings, **{"experts": 4, "top_k": 2, **spec})
        engine.moe(8, 8)
        return engine

    return build


REFUSED = {  # built-in -> the stranger it can't be combined with
    "overload": "leveller",
    "lora": "silencer",
    "quantile": "balancer",
    "schedule": "grower",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mix_with_a_strangers_plugin_is_refused_by_both_names(built, name):
    built(name)
    built(REFUSED[name])
    with pytest.raises(UsageError, match=f"(?s)(?=.*{name})(?=.*{REFUSED[name]})"):
        built(f"{name},{REFUSED[name]}")


def test_a_strangers_bias_is_refused_with_quantile(built):
    with pytest.raises(UsageError, match=r"(?=.*quantile)(?=.*leveller)"):
        built("quantile,leveller")


REMARKED = {  # built-in that remarks -> (the stranger, settings)
    "router_diversity": ("copier", []),
    "mutual_information": ("sharpener", []),
    "importance_cv2": ("evener", ["importance_cv2.of=probs"]),
    "loss_free": ("leveller", []),
}


@pytest.mark.parametrize("name", REMARKED)
def test_a_remark_names_a_strangers_plugin(built, name):
    stranger, settings = REMARKED[name]
    assert built(name, settings).plugins.remarks == {}
    remark = built(f"{name},{stranger}", settings).plugins.remarks[name]
    assert stranger in remark.why and stranger in remark.advice


def test_a_strangers_balance_loss_is_remarked_on_from_a_weight_of_a_thousandth(built):
    remark = built("loss_free,balancer").plugins.remarks["loss_free"]
    assert "balancer" in remark.why and "balancer" in remark.advice
    assert built("loss_free,balancer", ["balancer.weight=0.0009"]).plugins.remarks == {}


def test_importance_of_gates_is_no_variance_of_probabilities(built):
    assert built("importance_cv2,evener").plugins.remarks == {}


def test_exact_clones_are_allowed_where_a_strangers_plugin_separates_them(built):
    with pytest.raises(UsageError, match=r"clone\.noise=0"):
        built("clone", ["clone.noise=0"])
    built("clone,dealer", ["clone.noise=0"])
