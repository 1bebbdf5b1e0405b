"""Claims about whatever acts in a layer: what may change its answers, and when its state may move."""

from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..layer.moe import MoE
from .bench import EXPERTS, Bench, Data, Rig, Seen, data
from .claims import claim, demand
from .comparing import agree, distance, finite, same_bits

ACTING = ("moe_router", "moe_bias", "moe_experts", "moe_state", "moe_aux_loss", "moe_measure")


@claim(*ACTING, "moe_metrics", "moe_growth", "moe_new_expert")
def builds(bench: Bench) -> None:
    """A layer can be built with it, and makes a training step of finite numbers."""
    finite(bench.rig().step(), "in a plain step", "look for divisions by 0, and logs and roots of it")


@claim(*ACTING)
def inputs_stay(bench: Bench) -> None:
    """What it is given is not changed in place."""
    rig, batch = bench.rig(), data()
    with torch.no_grad():
        for training in (True, False):
            rig.layer.train(training)
            rig.forward(batch)
    for name, was, now in zip(("x", "ids", "labels"), _columns(data()), _columns(batch), strict=True):
        demand(same_bits(was, now), f"{name} is not what it was; work on a copy, as x * 2 and not x *= 2")
    if not rig.layer.router.levels:
        return
    rig.layer.train()
    logits = [one.detach() for one in rig.logits(torch.randn)]
    before = [one.clone() for one in logits]
    rig.give_logits(*logits)
    rig.forward(batch)
    unchanged = all(map(same_bits, before, logits))
    demand(unchanged, "the raw logits are not what they were; write logits + b, not logits += b")


def _columns(batch: Data) -> tuple[Tensor, ...]:
    return batch.x, batch.ids, batch.labels


@claim(*ACTING)
def padding_changes_nothing(bench: Bench) -> None:
    """Padding changes nothing: neither what it holds nor that it is there."""
    advice = "leave padding out of every sum over tokens: routing.mean(values), tokens.real(values), plan.selected"
    batch = data()
    mask = torch.arange(8).expand(3, 8) < torch.tensor([[8], [5], [0]])
    clean = attrs.evolve(batch, mask=mask)
    dirty = attrs.evolve(clean, x=batch.x.masked_fill(~mask[..., None], torch.nan), ids=batch.ids.masked_fill(~mask, 3))
    agree(bench.rig().step(clean), bench.rig().step(dirty), f"two batches differ only in their padding; {advice}", 1e-6)
    short, padded = data(1, 8).map(lambda v: v[:, :5]), attrs.evolve(data(1, 8), mask=mask[1:2])
    alone, beside = quiet(bench.rig(), short), quiet(bench.rig(), padded)
    beside["output"] = beside["output"][:, :5]
    agree(alone, beside, f"one of two batches has three tokens of padding more; {advice}", 1e-4)


@claim(*ACTING)
def order_changes_nothing(bench: Bench) -> None:
    """The order of the sequences in a batch changes nothing but the order of the answers."""
    batch, turn = data(), torch.tensor([2, 0, 1])
    expected = quiet(bench.rig(), batch)
    expected["output"] = expected["output"][turn]
    advice = "the batch's sequences came in another order; let nothing depend on a token's place in the batch"
    agree(expected, quiet(bench.rig(), batch.map(lambda v: v[turn])), advice, 1e-4)


def quiet(rig: Rig, batch: Data) -> Seen:
    """What there is to see of a step that noise does not blur, because the layer is in eval mode."""
    layer = rig.layer.eval()
    y, routing = rig.forward(batch), rig.route(batch)
    terms = layer.aux_terms(routing)
    (batch.loss(y) + sum(terms.values(), torch.zeros(()))).backward()
    measured = layer.measure(routing)
    sums = {f"sum '{name}'": value.detach() for name, value in measured.items()}
    values = {f"loss '{name}'": value.detach() for name, value in terms.items()}
    return {"output": y.detach(), **values, **sums, **rig.gradients()}


@claim(*ACTING)
def other_layers_change_nothing(bench: Bench) -> None:
    """A second layer of the same engine changes nothing in the first."""
    expected = _told(bench.rig(), None)
    rig = bench.rig()
    found = _told(rig, bench.second(rig, experts=EXPERTS + 2))
    agree(expected, found, "keep state in a Part of the layer (moe_state), never on the plugin or in a module", 1e-4)


def _told(rig: Rig, second: MoE | None) -> Seen:
    """Two steps of the first layer beside a second one, without what the weights make of a loss that both share."""
    seen: Seen = {}
    for number in range(2):
        if second is not None:
            second(*data(seed=9).arguments)
        own = rig.backward(data(), seed=number)
        rig.engine.after_step()
        own |= rig.controllers()
        seen |= {
            f"{name} in step {number}": value for name, value in own.items() if not name.startswith("gradient of ")
        }
    return seen


@claim("moe_router")
def layers_start_apart(bench: Bench) -> None:
    """The routers of two layers do not begin with the same weights."""
    rig = bench.rig()
    second = bench.second(rig).router
    for (name, one), other in zip(rig.layer.router.named_parameters(), second.parameters(), strict=True):
        constant = bool((other == other.flatten()[0]).all())  # as zeros
        demand(
            constant or not same_bits(one, other), f"{name} is the same in two layers; draw without a seed of your own"
        )


@claim(*ACTING)
def same_seed_same_result(bench: Bench) -> None:
    """The same seed gives the same result, bit for bit."""
    advice = "draw from torch's generators, where tensors are made or in a forward, and from nothing else"
    first, second = bench.rig(), bench.rig()
    for number in range(2):
        agree(first.step(seed=number), second.step(seed=number), advice, 0)


@claim(*ACTING)
def recomputed_forward_counts_once(bench: Bench) -> None:
    """A forward that is recomputed under activation checkpointing counts once, and routes as it did."""
    expected = bench.rig().step()
    for reentrant in (True, False):

        def twice(layer: Any, x: Tensor, *rest: Any, reentrant: bool = reentrant) -> Tensor:
            y: Tensor = checkpoint(layer, x.detach().requires_grad_(), *rest, use_reentrant=reentrant)
            return y

        advice = f"the forward ran twice (use_reentrant={reentrant}); count in measure() or moe_measure, nowhere else"
        agree(expected, bench.rig().step(wrap=twice), advice)


@claim(*ACTING)
def only_a_step_moves_state(bench: Bench) -> None:
    """State moves in after_step only: not in a forward, not in a backward, not in a step that was skipped."""
    advice = "; move state in after_step(step) and nowhere else: measure() brings there what it needs"
    rig = bench.rig()
    rig.step()
    before = rig.state()
    rig.backward(data())
    rig.demand_still(before, f"between two steps{advice}")
    rig.engine.after_step(skipped=True)
    rig.demand_still(before, f"in a step that was skipped{advice}")


@claim(*ACTING)
def eval_moves_nothing(bench: Bench) -> None:
    """Evaluation leaves the state of training as it is."""
    rig = bench.rig()
    rig.step()
    before = rig.state()
    rig.evaluate(data(seed=2))
    rig.demand_still(before, "in evaluation; act in after_step(step), and nowhere else")


@claim(*ACTING)
def eval_is_not_random(bench: Bench) -> None:
    """Evaluation draws no random number, and two evaluations agree."""
    advice = "draw noise only `if self.training`"
    rig = bench.rig()
    rig.layer.eval()
    with torch.no_grad():
        for parameter in rig.layer.router.parameters():
            parameter.mul_(8)  # a sharp gate shows what a flat one hides
        gap = distance(rig.forward(data(), seed=0), rig.forward(data(), seed=1))
        demand(not gap, f"the same tokens have another output with another seed; {advice}")
        before = torch.get_rng_state()
        rig.layer(*data().arguments)
        demand(same_bits(before, torch.get_rng_state()), f"random numbers were drawn; {advice}")


@claim(*ACTING)
def micro_batches_add_up(bench: Bench) -> None:
    """Two micro-batches move state as one batch of both does."""
    batch = data()
    together, parted = bench.rig(), bench.rig()
    for rig, batches in ((together, [batch.map(lambda v: torch.cat([v, v]))]), (parted, [batch, batch])):
        router = rig.layer.router.eval()  # noise would differ
        router.train = lambda mode=True, router=router: router  # type: ignore[method-assign, misc]
        rig.step(*batches)
    advice = "answer sums over tokens from measure() and moe_measure, which the core adds up, not means"
    agree(together.controllers(), parted.controllers(), f"after two micro-batches, not one batch; {advice}", 1e-3)
