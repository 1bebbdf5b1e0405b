"""What users read when a plugin breaks: its name, distribution, version and hook or part method; never "a bug"."""

import attrs
import pytest
import torch

from moe_engine import Bias, LinearRouter, Part, StackedMLP, assign, hookimpl
from moe_engine.cli import main

QUICK = ["--task", "blobs", "--set", "blobs.images=200", "--set", "blobs.test_images=50", "--epochs", "1", "--quiet"]


def boom(*_, **__):
    raise LookupError("boom")


def in_use(tokens):
    """Not in the rehearsal of a new layer, which has four tokens."""
    return tokens.x.shape[0] > 4


class BadRouter(LinearRouter):
    def __init__(self, spec, bad):
        super().__init__(spec)
        self.bad = bad

    def score(self, tokens):
        if self.bad == "score" and in_use(tokens):
            boom()
        return super().score(tokens)

    def select(self, tokens, levels):
        if self.bad == "select" and in_use(tokens):
            boom()
        probs_TE = levels[0].biased.softmax(-1)
        expert_TK = levels[0].select_by(probs_TE).topk(self.top_k, dim=-1).indices
        return probs_TE, assign(probs_TE.gather(-1, expert_TK), expert_TK, tokens)


class BadBias(Bias):
    def __init__(self, size, bad):
        super().__init__()
        self.bad, self.calls, self.wants_signal = bad, 0, bad == "signal"
        self.expert_buffer("b", torch.zeros(size), new="mean")

    def forward(self):
        self.calls += 1
        if self.bad == "forward" and self.calls > 3:
            boom()
        return self.b

    def measure(self, level, tokens):
        if self.bad == "measure" and in_use(tokens):
            boom()
        return {}

    def signal(self, grad_TD, token_N, unit_N, weight_N):
        if len(grad_TD) > 4:
            boom()
        return torch.zeros_like(self.b)

    def after_step(self, step):
        if self.bad == "after_step":
            boom()


class BadState(Part):
    def after_step(self, step):
        boom()


class BadExperts(StackedMLP):
    def __init__(self, spec, bad):
        super().__init__(spec)
        self.bad = bad

    def forward(self, x_ND, counts_E):
        if self.bad == "forward" and len(x_ND) > 20:
            boom()
        return super().forward(x_ND, counts_E)


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        boom()


class Stale:
    """A loss that keeps the graph of its first forward."""

    kept = None

    @hookimpl
    def moe_aux_loss(self, routing):
        if not in_use(routing.tokens):
            return 0 * routing.probs.sum()
        self.kept = routing.probs.square().mean() if self.kept is None else self.kept
        return self.kept


class StaleExperts(BadExperts):
    """A bank that adds the graph of its first forward to each output."""

    kept = None

    def forward(self, x_ND, counts_E):
        y_NO = super().forward(x_ND, counts_E)
        if len(x_ND) > 20 and torch.is_grad_enabled():
            self.kept = self.w_in.square().mean() if self.kept is None else self.kept
            y_NO = y_NO + self.kept
        return y_NO


class Constructor:
    def __attrs_post_init__(self):
        raise KeyError("boom")

    @hookimpl
    def moe_metrics(self, stats):
        return {}


def hooks(**functions):
    """A plugin class with these hooks."""
    body = {}
    for name, function in functions.items():
        function.__name__ = name
        body[name] = hookimpl(function)
    return type("Broken", (), body)


def harmless(self, routing):
    return 0 * routing.probs.sum()


def loss_in_use(self, routing):
    return boom() if in_use(routing.tokens) else harmless(self, routing)


def measure_in_use(self, routing):
    return boom() if in_use(routing.tokens) else {"a": routing.load}


def in_backward(self, routing):
    return BadBackward.apply(routing.probs.sum()) if in_use(routing.tokens) else harmless(self, routing)


CASES = {  # kind, plugin class, what the sentence names
    "loss": ("loss", hooks(moe_aux_loss=loss_in_use), "moe_aux_loss"),
    "backward": ("loss", hooks(moe_aux_loss=in_backward), "backward"),
    "stale": ("loss", Stale, "backward of moe_aux_loss"),
    "constructor": ("metric", Constructor, "its constructor"),
    "metrics": ("metric", hooks(moe_metrics=lambda self, stats: boom()), "moe_metrics"),
    "measure": ("metric", hooks(moe_measure=measure_in_use, moe_metrics=lambda self, stats: {}), "moe_measure"),
    "report": ("report", hooks(moe_report=lambda self, run: boom()), "moe_report"),
    "growth": ("growth", hooks(moe_growth=lambda self, history: boom()), "moe_growth"),
    "new_expert": ("initializer", hooks(moe_new_expert=lambda self, parent: boom()), "moe_new_expert"),
    "task": ("task", hooks(moe_task=lambda self, spec: boom()), "moe_task"),
    "check": ("loss", hooks(moe_check=lambda self, setup: boom(), moe_aux_loss=harmless), "moe_check"),
    "state": ("loss", hooks(moe_state=lambda self, spec: boom(), moe_aux_loss=harmless), "moe_state"),
    "state_step": ("loss", hooks(moe_state=lambda self, spec: BadState(), moe_aux_loss=harmless), "after_step"),
    "router": ("router", hooks(moe_router=lambda self, spec: boom()), "moe_router"),
    "score": ("router", hooks(moe_router=lambda self, spec: BadRouter(spec, "score")), "score"),
    "select": ("router", hooks(moe_router=lambda self, spec: BadRouter(spec, "select")), "select"),
    "bias": ("bias", hooks(moe_bias=lambda self, spec, level: boom()), "moe_bias"),
    **{f"bias_{bad}": ("bias", None, bad) for bad in ("forward", "measure", "signal", "after_step")},
    "experts": ("experts", hooks(moe_experts=lambda self, spec: boom()), "moe_experts"),
    "stale_experts": (
        "experts",
        hooks(moe_experts=lambda self, spec: StaleExperts(spec, "")),
        "backward of moe_experts",
    ),
    "outputs": ("experts", hooks(moe_experts=lambda self, spec: BadExperts(spec, "forward")), "forward"),
}


def bias_of(bad):
    """A plugin with a bias that breaks in one method."""
    return hooks(moe_bias=lambda self, spec, level: BadBias(level.size, bad))


@pytest.mark.parametrize("case", CASES)
def test_a_broken_plugin_is_named_with_its_distribution_and_hook(case, install, capsys, tmp_path):
    kind, cls, where = CASES[case]
    cls = bias_of(where) if case.startswith("bias_") else cls
    install(kind, "broken", attrs.define(eq=False)(type("Broken", (cls,), {})))
    words = ["--plugins", "broken,schedule" if kind == "initializer" else "broken"] if kind != "task" else []
    words += ["--set", "schedule.every=1"] if kind == "initializer" else []
    quick = ["--task", "broken", "--quiet"] if kind == "task" else QUICK
    code = main(["run", *quick, *words, "--no-plugin", "plots", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert code in (1, 2) and err.count("\n") == 1
    assert f"{kind} 'broken' (elsewhere 1.0)" in err and where in err, err
    assert "this is a bug" not in err


def test_one_failing_report_costs_no_other(install, capsys, tmp_path):
    install("report", "broken", attrs.define(eq=False)(CASES["report"][1]))
    assert main(["run", *QUICK, "--plugins", "broken", "--no-plugin", "plots", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert (
        "report 'broken' (elsewhere 1.0) in moe_report failed at step 4: LookupError: boom" in err
        and "other reports are complete" in err
    )
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "summary.json").exists()
