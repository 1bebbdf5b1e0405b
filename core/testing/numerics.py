"""Claims about numbers: extreme ones, few ones, and every precision."""

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .bench import Bench, data
from .claims import claim, demand
from .comparing import agree, finite, same_bits
from .layers import ACTING, quiet

CLAMP = "divide by a count only after clamp(min=1)"


@claim(*ACTING)
def extremes_stay_finite(bench: Bench) -> None:
    """Logits of 50 and -50, equal logits and inputs of scale 50 give finite outputs, gradients, losses and states."""
    advice = "compute in logs, by log_softmax and logsigmoid, and clamp what you divide by"
    rig = bench.rig()
    finite(rig.step(attrs.evolve(data(), x=50 * data().x)), "for inputs of scale 50", advice)
    signs_Tn = torch.randint(2, (24, 99), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    cases: dict[str, Callable[[int, int], Tensor]] = {
        "for logits of 50 and -50": lambda tokens, units: 50 * signs_Tn[:tokens, :units],
        "where all logits are 50": lambda tokens, units: torch.full((tokens, units), 50.0),
        "where all logits are -50": lambda tokens, units: torch.full((tokens, units), -50.0),
        "where all logits are 0": torch.zeros,
    }
    for when, make in cases.items() if rig.layer.router.levels else ():
        rig = bench.rig()
        logits = rig.logits(make)
        rig.give_logits(*logits)
        seen = rig.step()
        seen |= {f"the gradient at logits {n}": one.grad for n, one in enumerate(logits) if one.grad is not None}
        finite(seen, when, advice)


@claim(*ACTING)
def few_tokens_are_fine(bench: Bench) -> None:
    """One token, no token and nothing but padding are fine, and what is no token moves no state."""
    rig = bench.rig()
    rig.step()
    for shape in ((1,), (1, 1), (1, 2)):
        finite(rig.step(data(*shape)), f"for tokens of shape {list(shape)}", CLAMP)
    hidden = attrs.evolve(data(), mask=torch.zeros(3, 8, dtype=torch.bool))
    for batch, what in ((data(0), "no token"), (data(2, 0), "no token"), (hidden, "nothing but padding")):
        before = rig.controllers()
        seen = rig.step(batch)
        finite(seen, f"with {what}", CLAMP)
        demand(not seen["output 0"].any(), f"the output is not 0 with {what}; an output is of real tokens only")
        rig.demand_still(before, f"with {what}; where step.load.sum() is 0, leave it as it is", 1e-6)


@claim(*ACTING)
def empty_experts_are_safe(bench: Bench) -> None:
    """Experts without a token are safe: all stays finite, step after step."""
    advice = "an expert may have no token: mean over those that have some, or clamp(min=1)"
    rig, one = bench.rig(), data(1, 1)
    same = one.map(lambda v: v.expand(3, 8, *v.shape[2:]).clone())
    for _ in range(3):
        finite(rig.step(same), "where all tokens are one and the same", advice)
    if rig.layer.router.levels:
        rig.give_logits(*rig.logits(lambda tokens, units: 5.0 * torch.arange(units, 0, -1).repeat(tokens, 1)))
        for _ in range(3):
            finite(rig.step(), "where the last experts get no token", advice)


@claim(*ACTING)
def double_precision_agrees(bench: Bench) -> None:
    """float64 gives what fp32 gives, outputs, losses and gradients, and stays float64."""
    single, rig = bench.rig(), bench.rig()
    rig.layer.double()
    expected, found = quiet(single, data()), quiet(rig, data().to(torch.float64))
    routing = rig.route(data().to(torch.float64))
    made = {f"the logits of level '{level.name}'": level.logits for level in routing.levels}
    made |= {"the output": found["output"], "the gate": routing.plan.weight}
    made |= {f"loss '{name}'": value for name, value in rig.layer.aux_terms(routing).items()}
    for name, value in made.items():
        kept = value.dtype == torch.float64
        demand(kept, f"{name} is {value.dtype} for inputs of float64; raise what is below fp32, and lower nothing")
    agree(expected, found, "between fp32 and float64; cast nothing but what is below fp32", 1e-3)


@claim(*ACTING)
def bf16_works(bench: Bench) -> None:
    """A layer in bf16 trains: its outputs are bf16 and finite, its states and logits stay in fp32 or better."""
    rig, batch = bench.rig(), data().to(torch.bfloat16)
    states = [name for name, value in rig.controllers().items() if value.is_floating_point()]
    rig.layer.bfloat16()
    seen = {**rig.backward(batch), **rig.state()}
    finite(seen, "in bf16", "compute in fp32: values.float()")
    kind = seen["output 0"].dtype
    demand(kind == torch.bfloat16, f"the output is {kind} for inputs of bf16; cast it back")
    for name in states:
        why = f"{name} became {seen[name].dtype}, in which a step of 1e-3 is lost; make it a buffer of a Part"
        demand(seen[name].element_size() >= 4, why)
    for level in rig.route(batch).levels:
        demand(level.logits.element_size() >= 4, f"the logits are {level.logits.dtype}; score with linear_logits")


@claim(*ACTING)
def autocast_changes_no_choice(bench: Bench) -> None:
    """Under autocast the same experts are chosen with the same gates, and all stays finite."""
    one, other = bench.rig(), bench.rig()
    expected = one.route(data())
    with torch.autocast("cpu", torch.bfloat16):
        found, seen = other.route(data()), other.step()
    finite(seen, "under autocast", "compute in fp32: values.float()")
    kind = seen["output 0"].dtype
    demand(kind == torch.bfloat16, f"the output is {kind} under autocast; cast it back")
    kept = same_bits(expected.gates(), found.gates())
    demand(kept, "gates differ under autocast; it is off in score() and select(): leave it off")
