"""Growth, removal and replacement of experts of a live layer: all of it or nothing."""

import copy
import gc
import resource
import sys

import attrs
import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from moe_engine import Engine, Growth, NewExpert, UsageError, adam, hookimpl
from moe_engine import optimizer_state as optimizers
from moe_engine.contract import growth
from moe_engine.contract.parts import Part
from moe_engine.growth import transaction
from rig import INITIALIZERS, LOSSES, ROUTERS, Rig, same
from support import refused

# -- what a growth does ------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_old_experts_and_their_moments_stay_bit_for_bit(router, initializer):
    rig = Rig(f"{router},{LOSSES},{initializer}", experts=6).train(5)
    before = {n: p.detach().clone() for n, p in rig.layer.named_parameters()}
    moments = {n: copy.deepcopy(rig.optimizer.state[p]) for n, p in rig.layer.named_parameters()}
    record = rig.grow(1)
    assert (record.before, record.after, record.rows) == (6, 7, (*range(6), None))
    for name, parameter in rig.layer.named_parameters():
        if "group_weight" in name:
            continue
        kept = [row for row in range(6) if not (initializer == "split" and row == 1)]
        assert torch.equal(parameter[kept], before[name][kept]), name
        for key in ("exp_avg", "exp_avg_sq"):
            state = rig.optimizer.state[parameter]
            assert torch.equal(state[key][:6], moments[name][key]), (name, key)
            assert torch.equal(state["step"], moments[name]["step"])
    rig.train(5)


def test_new_experts_of_each_source_are_what_they_say():
    def new_expert(initializer, settings=()):
        rig = Rig(f"topk,{initializer}").train(3)
        before = copy.deepcopy(rig.layer)
        rig.grow(1)
        return before.requires_grad_(False), rig.layer.requires_grad_(False)

    before, after = new_expert("random")
    assert after.experts.w_in[4].abs().max() <= 6**-0.5
    assert not torch.equal(after.experts.w_in[4], before.experts.w_in[1])
    before, after = new_expert("zero_output")
    assert not after.experts.w_out[4].any()
    assert not after.experts.b_out[4].any()
    assert after.experts.w_in[4].any()
    before, after = new_expert("clone")
    assert torch.equal(after.router.weight[4], before.router.weight[1])
    noise = after.experts.w_in[4] - before.experts.w_in[1]
    assert float(noise.std() / before.experts.w_in[1].std()) == pytest.approx(0.01, rel=0.5)
    before, after = new_expert("split")
    for name in ("w_in", "w_out", "b_in", "b_out"):
        old, new = getattr(before.experts, name), getattr(after.experts, name)
        assert not torch.equal(new[1], old[1])
        torch.testing.assert_close((new[1] + new[4]) / 2, old[1])
    torch.testing.assert_close((after.router.weight[1] + after.router.weight[4]) / 2, before.router.weight[1])


def test_a_parent_of_several_is_split_again_and_again():
    rig = Rig("topk,split").train(3)
    before = rig.layer.experts.w_in[1].detach().clone()
    rig.grow(1, 1, 1)
    rows = rig.layer.experts.w_in.detach()[[1, 4, 5, 6]]
    assert len({float(row.sum()) for row in rows}) == 4
    torch.testing.assert_close(rows[3] + rows[0] + (rows[2] - rows[3] - rows[0]), rows[2])
    assert (rows.mean(0) - before).norm() < before.norm()


def test_biases_and_histories_follow_their_rules():
    rig = Rig(experts=4).train(10)
    saturation, loss_free = rig.layer.biases[0]["saturation"], rig.layer.biases[0]["loss_free"]
    s, b = saturation.s.clone(), loss_free.b.clone()
    rig.grow(3)
    torch.testing.assert_close(saturation.s, torch.cat([s, s.mean()[None]]))
    grown = torch.cat([b, b[3:]])
    torch.testing.assert_close(loss_free.b, grown - grown.mean())


def test_removal_and_replacement():
    rig = Rig(experts=5).train(3)
    rows = rig.layer.router.weight.detach().clone()
    record = rig.grow(drop=(1, 3))
    assert (record.rows, record.drop, record.initializer, rig.layer.spec.experts) == ((0, 2, 4), (1, 3), None, 3)
    assert torch.equal(rig.layer.router.weight, rows[[0, 2, 4]])
    record = rig.grow(0, drop=(1,))
    assert (record.rows, record.parents, rig.layer.spec.experts) == ((0, None, 2), (0,), 3)
    assert torch.equal(rig.layer.router.weight[[0, 2]], rows[[0, 4]])
    assert not torch.equal(rig.layer.router.weight[1], rows[2])
    rig.train(3)


def test_whole_groups_come_and_go():
    rig = Rig(f"hierarchical,{LOSSES},clone", experts=6).train(3)
    router = rig.layer.router
    rows = router.group_weight.detach().clone()
    record = rig.grow(1, of="group")
    assert (record.before, record.after, record.parents) == (6, 9, (3, 4, 5))
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(router.group_weight, rows[[0, 1, 1]])
    assert rig.layer.biases[0]["saturation"].s.shape == (3,)
    assert rig.layer.biases[1]["saturation"].s.shape == (9,)
    rig.train(3)
    record = rig.grow(drop=(0,), of="group")
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1]
    rig.grow(drop=(1,), of="group")  # one group remains, whatever the option says
    rig.grow(0, of="group")
    record = rig.grow(1, drop=(0,), of="group")
    assert (record.rows, router.group_of.tolist()) == ((None, None, None, 3, 4, 5), [0, 0, 0, 1, 1, 1])
    rig.grow(0)  # one more in the first group alone
    assert router.group_of.tolist() == [0, 0, 0, 1, 1, 1, 0]
    rig.train(3)


def test_a_frozen_layer_grows_and_loads_and_stays_frozen():
    rig = Rig(optimizer=lambda model, lr: adam(model[2], lr))
    rig.layer.requires_grad_(False)
    rig.grow(0, optimizers=())
    rig.layer.load_state_dict(Rig(experts=7).layer.state_dict())
    assert rig.layer.spec.experts == 7
    assert not any(parameter.requires_grad for parameter in rig.layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_layer_of_any_precision_grows_and_loads(dtype, initializer):
    rig = Rig(f"topk,saturation,switch_aux,{initializer}")
    rig.model.to(dtype)
    rig.x = rig.x.to(dtype)
    record = rig.grow(1)
    assert record.change >= 0
    assert {p.dtype for p in rig.model.parameters()} == {dtype}
    small = Rig(f"topk,saturation,switch_aux,{initializer}")
    small.model.to(dtype).load_state_dict(rig.model.state_dict())
    assert torch.equal(small.model(rig.x), rig.model(rig.x))


def test_layers_of_one_model_grow_by_themselves():
    """Blocks that were made by copying one another have the same past, and separate futures."""
    engine = Engine("topk,clone", experts=4)
    block = nn.Sequential(nn.Linear(6, 6), engine.moe(6, 5))
    model = nn.Sequential(block, copy.deepcopy(block), copy.deepcopy(block))
    engine.attach(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    engine.grow(Growth("1.1", (0,)), followers=average)
    sizes = [layer.spec.experts for layer in (*engine.layers, *Engine("topk").attach(average).layers)]
    assert sizes == [4, 5, 4, 4, 5, 4]


# -- all or nothing ----------------------------------------------------------------------------------


@pytest.fixture
def no_search(monkeypatch):
    """The search for other holders takes most of a growth's time, and finds nobody here."""
    monkeypatch.setattr(optimizers, "live", lambda *kinds: [])


class Fault:
    """Raises at the n-th line that some source files execute."""

    def __init__(self, at, error, *modules):
        self.at, self.error, self.lines = at, error, []
        self.files = {module.__file__ for module in modules}
        self.where = None

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, _):
        code = frame.f_code
        return self._line if code.co_filename in self.files and not code.co_name.startswith("<") else None

    def _line(self, frame, event, _):
        if event == "line":
            self.lines.append((frame.f_code.co_name, frame.f_lineno))
            if len(self.lines) == self.at:
                self.where = self.lines[-1]
                raise self.error(f"line {self.at}")
        return self._line


@pytest.mark.parametrize(
    ("plugins", "every"),
    [
        ("topk,saturation,random", False),
        pytest.param("topk,saturation,random", True, marks=pytest.mark.long),
        pytest.param("hierarchical,saturation,loss_free,split", True, marks=pytest.mark.long),
    ],
)
def test_an_error_at_any_line_leaves_everything_as_it_was(plugins, every, no_search):
    """Every line that growth.py, transaction.py, optimizers.py and parts.py execute in a growth fails once.

    In the quick form the first line of each function does, and of the others every twelfth, where it is first executed.
    """
    modules = (growth, transaction, optimizers, sys.modules[Part.__module__])

    def trial(at, error=None):
        rig = Rig(plugins, experts=6).train(3)
        before = rig.everything()
        with Fault(at, error, *modules) as fault:
            try:
                rig.grow(1, drop=(0,))
            except (RuntimeError, KeyboardInterrupt, UsageError):  # one in the router is blamed on it
                same(before, rig.everything())
                sys.settrace(fault.before)
                rig.grow(1)  # it can still grow
                rig.train(1)
                return fault
        return fault

    lines = trial(0).lines  # nothing fails
    firsts = {line: lines.index(line) + 1 for line in dict.fromkeys(lines)}
    entries = {name: at for (name, _), at in reversed(firsts.items())}
    some = sorted({*entries.values(), *list(firsts.values())[::12], len(lines)})
    places = set()
    for at in range(1, len(lines) + 1) if every else some:
        fault = trial(at, (RuntimeError, KeyboardInterrupt)[at % 2])
        places.add(fault.where[0])
    assert {"stage", "commit", "put", "staged_state", "reindex", "_staged_tensor", "_new_experts"} <= places


@pytest.mark.parametrize("plugins", ["topk,random", "topk,saturation,random"])
def test_a_backward_through_a_growth_is_an_error_and_not_a_crash(plugins):
    rig = Rig(plugins).train(2)
    loss = rig.loss(rig.x)
    rig.grow(0)
    with pytest.raises(RuntimeError, match="the layer changed its number of experts between this forward and its"):
        loss.backward()
    assert rig.layer.router.weight.grad is None
    rig.optimizer.zero_grad()
    rig.train(1)


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.long)])
def test_many_growths_and_removals_leave_memory_flat(no_search, count):
    rig = Rig().train(2)

    def once():
        rig.grow(0)
        rig.grow(drop=(4,))
        rig.engine.growths.clear()

    for _ in range(10):
        once()
    gc.collect()
    tensors, peak = _tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        once()
    gc.collect()
    assert _tensors() <= tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096  # KiB


def _tensors():
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


# -- what is refused ---------------------------------------------------------------------------------


def test_layers_that_can_not_grow_say_why():
    engine = Engine("topk", experts=4)
    bank = engine.moe(6, modules=[nn.Linear(6, 6) for _ in range(4)], name="bank")
    with refused("layer-cannot-grow", "bank", "ModuleBank"):
        engine.grow(Growth("bank", (0,)))
    with refused("unknown-layer", "bnak", "did you mean 'bank'?"):
        engine.grow(Growth("bnak", (0,)))
    assert engine.layers == [bank]
    rig = Rig()
    nn.utils.parametrizations.weight_norm(rig.layer.experts, "w_in")
    with refused("layer-cannot-grow", "experts.w_in", "parametrised"):
        rig.grow(0)
    rig = Rig()
    nn.utils.prune.random_unstructured(rig.layer.experts, "w_in", 0.5)
    with refused("layer-cannot-grow", "experts.w_in", "pruned"):
        rig.grow(0)
    rig = Rig()
    rig.layer.experts.w_in.data[0, 0, 0] = torch.nan
    with refused("layer-cannot-grow", "experts.w_in", "not finite"):
        rig.grow(0)
    rig = Rig()
    with refused("bad-follower", "Sequential", "0 copies"):
        rig.grow(0, followers=Rig().model)
    average = torch.optim.swa_utils.AveragedModel(rig.model)
    rig.grow(0, followers=average)
    average.module[1].load_state_dict(Rig().layer.state_dict())
    with refused("bad-follower", "4 experts, not 5"):
        rig.grow(0, followers=average)
    with refused("bad-growth", "'moe'"):
        rig.engine.grow("moe", rig.optimizer)
    with refused("bad-growth", "not 3"):
        Growth("moe", parents=3)
    rig = Rig()
    with refused("bad-growth", "twice"):
        rig.grow(drop=(0, 0))
    with refused("layer-cannot-grow", "no expert axis"):  # at once, where a trigger is chosen
        Engine("topk,schedule").moe(6, modules=[nn.Linear(6, 6) for _ in range(4)], experts=4)
    rig = Rig("topk,random", optimizer=adam)
    other = rig.engine.moe(6, 5, bias=True, name="other")
    other.experts.w_in = rig.layer.experts.w_in
    with refused("layer-cannot-grow", "'moe' shares weights with 'other'"):
        rig.grow(0)
    rig = Rig("topk", experts=4)
    rig.engine = Engine("topk", ["topk.groups=2"], experts=4, top_k=1)
    rig.layer = rig.engine.moe(6, 5, name="moe")
    with refused("groups-cannot-grow", "groups=1"):
        rig.grow(0, optimizers=(), probe=None)
    rig = Rig("hierarchical", experts=4)
    with refused("too-few-experts", "2 experts each"):
        rig.grow(drop=(0,))
    with refused("growth-needs-parent", "group"):
        rig.grow(None, of="group")
    with refused("growth-needs-parent", "router.group_of"):
        rig.grow(None)


def test_twins_without_noise_are_refused():
    with refused("mix-refused", "clone.noise=0"):
        Engine("topk,clone", ["clone.noise=0"]).moe(4, 4)


def test_a_source_that_answers_nonsense_is_named(install):
    answers = {}

    @attrs.define(eq=False)
    class Odd:
        @hookimpl
        def moe_new_expert(self, parent, fresh):
            return answers["now"](parent, fresh)

    install("initializer", "odd", Odd)
    rig = Rig("topk,odd").train(1)
    before = rig.everything()
    for answer, words in (
        (lambda parent, fresh: None, "(asked: odd)"),
        (lambda parent, fresh: 3, "'odd' returned 3"),
        (lambda parent, fresh: NewExpert({}), "'odd' leaves out experts.b_in"),
        (lambda parent, fresh: NewExpert({**fresh, "x": fresh["experts.b_in"]}), "row 'x'"),
        (
            lambda parent, fresh: NewExpert({n: r[None] for n, r in fresh.items()}),
            "'router.weight' of shape [1, 6], not [6]",
        ),
        (lambda parent, fresh: NewExpert({n: r * torch.nan for n, r in fresh.items()}), "not finite"),
        (lambda parent, fresh: NewExpert(fresh, parent_values={"y": fresh["experts.b_in"]}), "of the parent 'y'"),
        (lambda parent, fresh: NewExpert({n: r.mul_(0) for n, r in parent.items()}), None),
    ):
        answers["now"] = answer
        if words is None:
            rig.grow(1)  # an initializer is given copies
            assert torch.equal(rig.layer.router.weight[1], before[0]["1.router.weight"][1])
            continue
        with refused("no-initializer" if "asked" in words else "bad-new-expert", words):
            rig.grow(1)
        same(before, rig.everything())


# -- copies, compiled and saved -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_a_compiled_layer_goes_on_past_every_limit_of_recompilation(backend):
    """A limit of 2, instead of torch's 8, is reached by the second size."""
    rig = Rig(f"topk,{LOSSES},clone", experts=2)
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(rig.model, fullgraph=True, backend=backend)
        for _ in range(2):
            rig.step(compiled)
            rig.grow(0)
            torch.testing.assert_close(compiled(rig.x), rig.model(rig.x))
            rig.engine.after_backward()
    assert rig.layer.spec.experts == 4


@pytest.mark.parametrize("router", ROUTERS)
def test_a_state_dict_loads_at_any_number_of_experts(router):
    rig = Rig(f"{router},{LOSSES},clone", experts=4).train(3)
    rig.grow(0)
    rig.grow(*((0,) if router != "hierarchical" else (1,)), of="group" if router == "hierarchical" else "expert")
    rig.train(2)
    fresh = Rig(f"{router},{LOSSES},clone", experts=4)
    fresh.model.load_state_dict(rig.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(rig.optimizer.state_dict()))
    fresh.random.set_state(rig.random.get_state())
    assert (fresh.layer.sizes, fresh.layer.spec) == (rig.layer.sizes, rig.layer.spec)
    assert [float(rig.step()) for _ in range(4)] == [float(fresh.step()) for _ in range(4)]
    for name, value in rig.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name])


def test_a_state_that_can_not_be_of_this_layer_is_refused_and_changes_nothing():
    rig, small = Rig().train(2), Rig().train(2)
    before = small.everything()
    rig.grow(0)
    state = {name: value for name, value in rig.model.state_dict().items() if "experts" in name}
    with refused("sizes-disagree", "experts.w_in is for 5", "router.weight for 4"):
        small.model.load_state_dict(state, strict=False)
    same(before, small.everything())
    with refused("bad-layer-spec", "top_k=2"):
        small.model.load_state_dict(Rig(experts=1, top_k=1).model.state_dict())
    small.step()


def test_gradients_of_the_old_size_go_with_the_old_size():
    rig, big = Rig("topk,random").train(2), Rig("topk,random", experts=9)
    rig.loss(rig.x).backward()
    with pytest.warns(UserWarning, match="dropped"):
        rig.model.load_state_dict(big.model.state_dict())
    assert rig.layer.experts.w_in.grad is None
