"""docs/conformance.md lists every claim, what rules out each known bug, and what became of reports that were tried."""

import gc
import re
from pathlib import Path

import faults_elsewhere
import faults_in_layers
import faults_in_routers
import faults_on_ranks
import pytest
import torch
from faults import FAULTS
from torch import nn

from moe_engine import Engine, Growth
from moe_engine.testing import CLAIMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text("utf-8")
BUGS, _, TRIED = PAGE.partition("\n## Reports tried on the engine\n")
ROWS, REPORTS = (
    {int(number): cell for number, cell in re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", part, re.M)}
    for part in (BUGS, TRIED)
)
NAMES = {claim.name for claim in CLAIMS}
MODULES = (faults_in_layers, faults_in_routers, faults_elsewhere, faults_on_ranks)  # where faults are registered


def test_the_page_lists_every_claim_with_its_sentence():
    listed = dict(re.findall(r"^- `(\w+)`: (.+)\.$", PAGE, re.M))
    assert {claim.name: claim.says for claim in CLAIMS} == listed


def test_every_known_bug_has_a_row():
    assert list(range(1, 32)) == sorted(ROWS)


@pytest.mark.parametrize("number", ROWS)
def test_what_rules_out_a_bug_exists(number):
    """Each claim catches a plugin with that bug; each test exists."""
    quoted = re.findall(r"`(\w+)`", ROWS[number])
    claims = [name for name in quoted if name in NAMES]
    assert claims or "`tests/" in ROWS[number]
    caught = {name for fault in FAULTS if number in fault.bugs for name in fault.claims}
    assert set(claims) <= caught
    assert_tests_exist(ROWS[number])


def assert_tests_exist(cell):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M), name


def test_every_report_that_was_tried_has_a_row_and_a_source():
    assert sorted(REPORTS) == list(range(32, 32 + len(REPORTS))) and len(REPORTS) >= 20
    sources = re.findall(r"^\| \d+ \| [^|]+ \| ([^|]+) \|", TRIED, re.M)
    assert len(sources) == len(REPORTS)
    for source in sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+(, ([\w.-]+/[\w.-]+)?#\d+)*", source), source


@pytest.mark.parametrize("number", REPORTS)
def test_what_covers_a_report_exists(number):
    assert set(re.findall(r"`(\w+)`", REPORTS[number])) <= NAMES
    assert "`" in REPORTS[number] or REPORTS[number] == "no test"
    assert_tests_exist(REPORTS[number])


def test_a_dropped_choice_leaves_the_other_gate_as_it_was():
    """Four equal tokens choose experts 0 and 1, which keep two each: gates are the same as without a limit."""

    def gates(capacity):
        layer = Engine(experts=4, top_k=2, capacity=capacity).moe(4, 4)
        with torch.no_grad():
            layer.router.weight[:] = torch.eye(4)
        return layer.route(layer.tokens(torch.tensor([[3.0, 2.0, 0.0, 0.0]]).expand(4, 4))).gates()

    free, limited = gates(None), gates(1.0)
    kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2 + [[0.0] * 4] * 2)
    torch.testing.assert_close(limited, free * kept)


# -- reports that were tried: what no other test covers -------------------------------------------------


def by_eye(plugins, experts, dim=None, settings=(), **spec):
    """An engine and its layer; the first entries of x are the router's logits."""
    engine = Engine(plugins, settings, experts=experts, **spec)
    layer = engine.moe(dim or experts, 8, name="moe")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(experts, dim or experts))
    return engine, layer


def routed(layer, x):
    with torch.no_grad():
        return layer.route(layer.tokens(x))


def terms(layer, x):
    return {name: value.detach() for name, value in layer.aux_terms(layer.route(layer.tokens(x))).items()}


def step(engine, layer, x):
    (layer(x).float().square().mean() + engine.aux_loss()).backward()
    engine.after_backward()
    engine.after_step()


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk", "noisy_topk"])
def test_negative_logits_cost_no_capacity(router):
    """Every expert is the best of four tokens, and may keep four."""
    _, layer = by_eye(router, 4, top_k=1, capacity=1.0)
    x = torch.full((16, 4), -60.0)
    x[range(16), [token % 4 for token in range(16)]] = -2.0
    assert routed(layer, x).plan.kept.all()


def test_noisy_routing_is_finite_in_evaluation():
    engine = Engine("noisy_topk,load_cv2,importance_cv2", experts=4, top_k=2)
    layer, x = engine.moe(8, 16, name="moe").eval(), torch.randn(32, 8)
    assert layer(x).isfinite().all() and routed(layer, x).smooth_load.isfinite().all()
    assert all(value.isfinite() for value in terms(layer, x).values())


def test_noise_reaches_no_expert():
    seen = []

    class Recorder(nn.Module):
        def forward(self, rows):
            seen.extend(map(tuple, rows.tolist()))
            return rows

    layer = Engine("noisy_topk", experts=4, top_k=2).moe(8, modules=[Recorder() for _ in range(4)])
    seen.clear()
    x = torch.randn(32, 8)
    layer(x)
    assert len(seen) == 64 and set(seen) == set(map(tuple, x.tolist()))


@pytest.mark.parametrize("plugin", ["switch_aux", "gshard", "sequence_aux", "importance_cv2", "entropy"])
def test_the_balance_loss_of_many_tokens_in_fp16_is_that_in_fp32(plugin):
    layer = Engine(plugin, experts=8, top_k=2).moe(16, 16).half()
    x = torch.randn(70_000, 16).half()
    low = terms(layer, x)
    torch.testing.assert_close(low, terms(layer.float(), x.float()), rtol=1e-3, atol=1e-3)
    assert all(value > 0 for value in low.values())


def normed(normalise):
    return nn.Sequential(nn.Linear(16, 16), nn.GroupNorm(4, 16)) if normalise else nn.Linear(16, 16)


@pytest.mark.parametrize("modules", [None, [True] * 4, [False, True, False, True]])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_every_mix_of_dtypes_trains_under_autocast(weights, given, modules):
    engine = Engine("switch_aux,saturation", experts=4, top_k=2)
    experts = {"hidden": 32} if modules is None else {"modules": [normed(each) for each in modules]}
    layer = engine.moe(16, **experts).to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(40, 16, dtype=given))
        loss = y.float().square().mean() + engine.aux_loss()
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_layer_in_bf16_counts_exactly():
    engine, layer = by_eye("loss_free", 4, settings=["loss_free.rate=0.01"], top_k=1)
    layer.bfloat16()
    counts = torch.tensor([10_005, 9_995, 10_001, 9_999])  # all of them are 9,984 or 10,048 in bf16
    x = 4 * torch.eye(4, dtype=torch.bfloat16).repeat_interleave(counts, 0)
    assert routed(layer, x).load.tolist() == counts.tolist()
    step(engine, layer, x)
    assert layer.biases[0]["loss_free"]().sign().tolist() == [-1, 1, -1, 1]


def test_a_layer_in_bf16_rounds_its_sum_once():
    layer = Engine("topk", experts=16, top_k=10).moe(64, 128).bfloat16().eval()
    x = torch.randn(512, 64).bfloat16()
    with torch.no_grad():
        low, high = layer(x), layer.double()(x.double())
    error, rounding = ((values.double() - high).norm() for values in (low, high.bfloat16()))
    assert error < 1.1 * rounding


@pytest.mark.parametrize("plugin", ["switch_aux", "gshard", "sequence_aux", "global_aux", "importance_cv2"])
def test_capacity_changes_no_loss(plugin):
    x, values = torch.randn(4, 64, 16), []
    for capacity in (None, 0.5):
        torch.manual_seed(0)
        layer = Engine(plugin, experts=8, top_k=2, capacity=capacity).moe(16, 16)
        values.append(terms(layer, x))
    assert routed(layer, x).dropped.sum() >= 256
    assert values[0] == values[1]


def test_the_sequence_loss_of_a_sigmoid_router_uses_its_scores():
    _, layer = by_eye("sigmoid_topk,sequence_aux", 8, top_k=2)
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    scores = x.sigmoid()
    share = torch.zeros_like(x).scatter(-1, x.topk(2).indices, 0.5).mean(1)
    expected = 8 * (share * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()
    torch.testing.assert_close(terms(layer.double(), x)["sequence_aux"], expected)


@pytest.mark.parametrize("training", [True, False])
def test_forwards_leave_no_tensors_behind(training):
    layer = Engine("saturation,switch_aux", experts=4, top_k=2).moe(16, 16).train(training)
    x = torch.randn(32, 16)

    def tensors():
        layer(x)
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    before = tensors()
    for _ in range(20):
        layer(x)
    assert tensors() <= before


@pytest.mark.parametrize("renorm", ["true", "false"])
def test_a_scale_acts_once_and_on_routed_experts_only(renorm):
    x, routed_part = torch.randn(30, 8, dtype=torch.float64), []
    for scale in (1, 2.5):
        torch.manual_seed(0)
        settings = [f"sigmoid_topk.scale={scale}", f"sigmoid_topk.renorm={renorm}"]
        layer = Engine("sigmoid_topk", settings, experts=4, top_k=2, shared=1).moe(8, 16).double()
        routed_part.append(layer(x) - layer.shared(x))
    torch.testing.assert_close(routed_part[1], 2.5 * routed_part[0])


def test_muons_momentum_of_a_router_grows_with_it():
    engine = Engine("saturation", experts=4, top_k=2)
    layer = engine.moe(8, 16, name="moe")
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(layer.parameters())
    muon = torch.optim.Muon([layer.router.weight], lr=0.01)
    adamw = torch.optim.AdamW(layer.experts.parameters(), lr=0.01)
    step(engine, layer, torch.randn(32, 8))
    muon.step()
    momentum = muon.state[layer.router.weight]["momentum_buffer"].clone()
    muon.zero_grad()
    adamw.zero_grad()
    engine.grow(Growth("moe", parents=(3,)), [muon, adamw])
    grown = muon.state[layer.router.weight]["momentum_buffer"]
    assert grown.shape == (5, 8) and torch.equal(grown[:4], momentum) and not grown[4].any()


def test_training_works_after_a_forward_in_inference_mode():
    engine = Engine("saturation,switch_aux", experts=4, top_k=2)
    layer, x = engine.moe(8, 16, name="moe"), torch.randn(32, 8)
    with torch.inference_mode():
        layer.eval()(x)
        layer.train()(x)
    layer.eval()(x)
    step(engine, layer.train(), x)
    assert engine.metrics("eval")["moe"] and engine.metrics("train")["moe"]


@pytest.mark.parametrize("router", ["topk", "sigmoid_topk"])
def test_a_dropped_choice_has_no_gradient(router):
    _, layer = by_eye(router, 4, top_k=1, capacity=0.5)
    x = torch.randn(16, 4, dtype=torch.float64) / 10
    x[:, 0] += 2
    dropped = routed(layer.double(), x).plan.dropped
    y = layer(x.requires_grad_())
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert dropped.sum() == 14 and not y[dropped].any() and not gradient[dropped].any()
    assert gradient[~dropped].any(-1).all()
