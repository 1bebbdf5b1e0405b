"""Claims about numerics: extreme values, few tokens and every precision."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .bench import Bench, data
from .claims import claim, demand
from .comparing import demand_close, demand_finite, same_bits
from .layers import LAYER_HOOKS, eval_step

CLAMP = "divide by a count only after clamp(min=1)"


@claim(*LAYER_HOOKS)
def extreme_values_stay_finite(bench: Bench) -> None:
    """Logits of 50 and -50, equal logits and inputs of scale 50 give finite outputs, gradients, losses and state."""
    advice = "compute in logs, with log_softmax and logsigmoid, and clamp divisors"
    trial = bench.trial()
    demand_finite(trial.step(attrs.evolve(data(), x=50 * data().x)), "for inputs of scale 50", advice)
    signs_Tn = torch.randint(2, (24, 99), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    cases: dict[str, Callable[[int, int], Tensor]] = {
        "for logits of 50 and -50": lambda tokens, units: 50 * signs_Tn[:tokens, :units],
        "if all logits are 50": lambda tokens, units: torch.full((tokens, units), 50.0),
        "if all logits are -50": lambda tokens, units: torch.full((tokens, units), -50.0),
        "if all logits are 0": torch.zeros,
    }
    for when, make in cases.items() if trial.layer.router.levels else ():
        trial = bench.trial()
        logits = trial.logits(make)
        trial.set_logits(*logits)
        tensors = trial.step()
        grads = {f"the gradient of logits {n}": level.grad for n, level in enumerate(logits) if level.grad is not None}
        demand_finite({**tensors, **grads}, when, advice)


@claim(*LAYER_HOOKS)
def few_tokens_work(bench: Bench) -> None:
    """One token, no tokens and only padding all work; without real tokens the output is 0 and no state changes."""
    trial = bench.trial()
    trial.step()
    for shape in ((1,), (1, 1), (1, 2)):
        demand_finite(trial.step(data(*shape)), f"for tokens of shape {list(shape)}", CLAMP)
    hidden = attrs.evolve(data(), mask=torch.zeros(3, 8, dtype=torch.bool))
    for batch, content in ((data(0), "no tokens"), (data(2, 0), "no tokens"), (hidden, "padding alone")):
        before = trial.controllers()
        tensors = trial.step(batch)
        demand_finite(tensors, f"with {content}", CLAMP)
        demand(not tensors["output 0"].any(), f"the output is not 0 with {content}; only real tokens have an output")
        trial.demand_unchanged(before, f"with {content}; leave it as it is if step.load.sum() is 0", 1e-6)


@claim(*LAYER_HOOKS)
def idle_experts_are_safe(bench: Bench) -> None:
    """If experts get no tokens, every tensor stays finite, step after step."""
    advice = "an expert may have no tokens: average over those that have some, or clamp(min=1)"
    trial, token = bench.trial(), data(1, 1)
    same = token.map(lambda v: v.expand(3, 8, *v.shape[2:]).clone())
    for _ in range(3):
        demand_finite(trial.step(same), "if all tokens are equal", advice)
    if trial.layer.router.levels:
        trial.set_logits(*trial.logits(lambda tokens, units: 5.0 * torch.arange(units, 0, -1).repeat(tokens, 1)))
        for _ in range(3):
            demand_finite(trial.step(), "if the last experts get no tokens", advice)


@claim(*LAYER_HOOKS)
def float64_agrees_with_float32(bench: Bench) -> None:
    """In float64, outputs, losses and gradients agree with those in float32, and stay float64."""
    single, double = bench.trial(), bench.trial()
    double.layer.double()
    expected, found = eval_step(single, data()), eval_step(double, data().to(torch.float64))
    routing = double.route(data().to(torch.float64))
    results = {f"the logits tensor of level '{level.name}'": level.logits for level in routing.levels}
    results |= {"the output": found["output"], "the gate": routing.plan.weight}
    results |= {f"loss '{name}'": value for name, value in double.layer.aux_terms(routing).items()}
    for name, value in results.items():
        kept = value.dtype == torch.float64
        demand(kept, f"{name} is {value.dtype} for float64 inputs; cast up what is below float32, never down")
    demand_close(expected, found, "between float32 and float64; cast only what is below float32", 1e-3)


@claim(*LAYER_HOOKS)
def bf16_works(bench: Bench) -> None:
    """A layer in bf16 trains: outputs are bf16 and finite; state and logits stay in float32 or better."""
    trial, batch = bench.trial(), data().to(torch.bfloat16)
    state_names = [name for name, value in trial.controllers().items() if value.is_floating_point()]
    trial.layer.bfloat16()
    tensors = {**trial.backward(batch), **trial.state()}
    demand_finite(tensors, "in bf16", "compute in float32: values.float()")
    dtype = tensors["output 0"].dtype
    demand(dtype == torch.bfloat16, f"the output is {dtype} for bf16 inputs; cast it back")
    for name in state_names:
        message = f"{name} became {tensors[name].dtype}, which loses a step of 1e-3; make it a buffer of a Part"
        demand(tensors[name].element_size() >= 4, message)
    for level in trial.route(batch).levels:
        wide = level.logits.element_size() >= 4
        demand(wide, f"the logits of level '{level.name}' are {level.logits.dtype}; score with linear_logits")


@claim(*LAYER_HOOKS)
def autocast_changes_no_gate(bench: Bench) -> None:
    """Under autocast the same experts are chosen with the same gates, and every tensor stays finite."""
    plain, autocast = bench.trial(), bench.trial()
    expected = plain.route(data())
    with torch.autocast("cpu", torch.bfloat16):
        found, tensors = autocast.route(data()), autocast.step()
    demand_finite(tensors, "under autocast", "compute in float32: values.float()")
    dtype = tensors["output 0"].dtype
    demand(dtype == torch.bfloat16, f"the output is {dtype} under autocast; cast it back")
    kept = same_bits(expected.gates(), found.gates())
    demand(kept, "gates differ under autocast; it is off in score() and select(), so do not turn it on")
