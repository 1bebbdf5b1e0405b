"""Faults that any part of a layer may have."""

import random
import time

import torch
from faults import Plain, Sign, Top, fault

from moe_engine import count_by, hookimpl, linear_logits


@fault("builds", message="loss 'per_token'", hook="moe_aux_loss")
def per_token(self, routing):
    """A loss for each token."""
    return routing.probs.square().sum(-1)


@fault("inputs_are_not_modified", message="labels was modified in place", bugs=(9,))
class ClampsLabels:
    """Labels of -100 become 0 in the caller's tensor."""

    @hookimpl
    def moe_measure(self, routing):
        if (labels := routing.tokens.labels) is not None:
            labels.data.clamp_(max=1)
        return {"seen": routing.tokens.count.view(1)}

    @hookimpl
    def moe_metrics(self, stats):
        return {"seen": stats["clamps_labels.seen"]}


@fault("inputs_are_not_modified", message="the raw logits were modified in place", bugs=(9,), hook="moe_router")
class AddsInPlace(Top):
    """DeepSpeed's `logits += noise`."""

    def probs(self, level):
        level.logits.data += 0.1
        return super().probs(level)


@fault("padding_changes_nothing", message="leave padding out of every sum", bugs=(12, 13), hook="moe_aux_loss")
def counts_padding(self, routing):
    """Means over all tokens."""
    return routing.experts * (routing.probs.sum(0) / max(len(routing.probs), 1)).square().sum()


@fault("sequence_order_changes_nothing", message="let nothing depend on a token's position", hook="moe_router")
class KnowsPlaces(Top):
    """Later rows prefer later experts."""

    def score(self, tokens):
        (logits_TE,) = super().score(tokens)
        place_T = torch.arange(len(logits_TE)).to(logits_TE)
        return (logits_TE + 0.1 * place_T[:, None] * torch.arange(logits_TE.shape[1]),)


@fault(
    "recomputed_layers_keep_apart",
    "same_seed_gives_same_result",
    "state_survives_save_and_load",
    "autocast_changes_no_gate",
    message="a router that passes values on declares carries",
    hook="moe_router",
)
class HidesWhatItPassesOn(Top):
    """Adds the logits of the layer before, which it keeps in its class."""

    last = (None, None)

    def score(self, tokens):
        (logits_TE,) = super().score(tokens)
        owner, before_TE = self.last
        type(self).last = self.weight, logits_TE.detach()
        another = owner is not None and owner is not self.weight and torch.is_grad_enabled() and self.training
        return (logits_TE + before_TE if another and before_TE.shape == logits_TE.shape else logits_TE,)


@fault("layers_are_independent", message="not on the plugin or in a module", bugs=(4, 19))
class PoolsLayers:
    """Every layer's loss is scaled by the largest layer so far."""

    most = 0

    @hookimpl
    def moe_aux_loss(self, routing):
        type(self).most = max(self.most, routing.experts)
        return self.most * routing.mean(routing.probs).square().sum()


@fault(
    *("same_seed_gives_same_result", "state_survives_save_and_load"),
    message="draw only from torch's generators",
    hook="moe_bias",
)
class Whims(Sign):
    """Noise from Python's own generator."""

    def after_step(self, step):
        if step.load.sum() > 0:
            self.b += self.rate * (1 - step.relative(step.load)).sign() + 1e-7 * random.random()


@fault(
    "recomputed_forward_counts_once",
    message="if the forward is recomputed (use_reentrant=True)",
    bugs=(14, 27),
    hook="moe_router",
)
class RoutesByGradMode(Top):
    """Noise only under grad mode: a recomputed forward routes differently."""

    def probs(self, level):
        noisy = self.training and torch.is_grad_enabled()
        return (level.biased + (0.3 * torch.randn(level.biased.shape[1]) if noisy else 0)).softmax(-1)


@fault(
    *("recomputed_forward_counts_once", "only_after_step_changes_state", "micro_batches_add_up"),
    message="if the forward is recomputed",
    bugs=(14, 15, 31),
    hook="moe_bias",
)
class MovesInForward(Sign):
    """Moves whenever measure() is called."""

    def measure(self, level, tokens):
        if tokens.count > 0:
            with torch.no_grad():
                self.b -= 0.1 * (level.logits.softmax(-1).mean(0) - 1 / len(self.b))
        return {}

    def after_step(self, step):
        """measure() has done it all."""


@fault("eval_changes_no_state", message="changed in evaluation", bugs=(15,), hook="moe_router")
class LearnsFromValidation(Top):
    """Validation traffic moves a running mean."""

    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("traffic", torch.zeros(()))

    def select(self, tokens, levels):
        if not self.training and not torch.is_inference_mode_enabled():
            self.traffic += tokens.count
        return super().select(tokens, levels)


@fault(
    "eval_is_deterministic",
    "first_choice_has_the_largest_gate",
    message="the output for the same tokens depends on the seed",
    bugs=(8,),
    hook="moe_router",
)
class JittersAlways(Top):
    """Noise whatever self.training is."""

    def probs(self, level):
        return (level.biased + torch.randn(level.biased.shape[1])).softmax(-1)


@fault("micro_batches_add_up", message="return sums over tokens, not means", bugs=(20,), hook="moe_bias")
class MeasuresMeans(Sign):
    """A mean per micro-batch; the core adds them up."""

    def measure(self, level, tokens):
        chosen_T = level.select_by(level.biased).argmax(-1)
        share_n = count_by(chosen_T, tokens.real(torch.ones(len(chosen_T))), len(self.b)) / tokens.count.clamp(min=1)
        return {"share": share_n}

    def excess(self, step):
        return step.own["share"] - 1 / len(self.b)


@fault(
    "extreme_values_stay_finite", message="is not finite for inputs of scale 50; compute in logs", hook="moe_aux_loss"
)
def exponentiates(self, routing):
    """The log of a sum of exponentials that overflow."""
    return routing.mean(routing.levels[0].logits.exp().square()).log1p().sum()


@fault("few_tokens_work", message="divide by a count only after clamp(min=1)", hook="moe_aux_loss")
def divides_by_count(self, routing):
    """Divides by the number of tokens, which may be 0."""
    tokens = routing.tokens
    return (tokens.real(routing.probs).sum(0) / tokens.count).square().sum()


@fault(
    *("few_tokens_work",),
    message="changed with no tokens; leave it as it is if step.load.sum() is 0",
    hook="moe_bias",
)
class ForgetsWithoutData(Sign):
    """A step without tokens counts as a step in which all experts were idle."""

    def after_step(self, step):
        self.b -= self.rate * (torch.sign(step.relative(step.load) - 1))


@fault(
    "idle_experts_are_safe", "few_tokens_work", message="an expert may have no tokens", bugs=(30,), hook="moe_aux_loss"
)
def divides_by_load(self, routing):
    """The mean gate of each expert over its tokens, of which it may have none."""
    return (routing.gates().sum(0) / routing.load).square().mean()


@fault("float64_agrees_with_float32", message="the logits tensor of level 'expert' is torch.float32", hook="moe_router")
class CastsToFloat(Top):
    """float32 for every input."""

    def score(self, tokens):
        return (tokens.x.float() @ self.weight.float().t(),)


@fault("bf16_works", message="are torch.bfloat16; score with linear_logits", bugs=(21,), hook="moe_router")
class ScoresInBf16(Top):
    """Logits in the inputs' precision, which tie."""

    def score(self, tokens):
        return (tokens.x @ self.weight.t(),)


@fault("bf16_works", message="became torch.bfloat16, which loses a step of 1e-3", bugs=(15, 21), hook="moe_bias")
class LosesSmallSteps(Sign):
    """A bias that is cast with its layer."""

    def _apply(self, fn, recurse=True):
        self.b = fn(self.b)
        return self


@fault("autocast_changes_no_gate", message="it raises RuntimeError", bugs=(21,), hook="moe_experts")
class MixesPrecisions(Plain):
    """A buffer in the inputs' precision for outputs that autocast made bf16."""

    def forward(self, x_ND, counts_E):
        out_NO = super().forward(x_ND, counts_E)
        return torch.zeros_like(x_ND).index_add(0, torch.arange(len(x_ND)), out_NO)


@fault("state_survives_save_and_load", message="which are saved, not in attributes", bugs=(15,), hook="moe_bias")
class DecaysUnsaved(Sign):
    """A rate that falls, as an attribute."""

    def after_step(self, step):
        super().after_step(step)
        self.rate = self.rate * 0.5


@fault("state_survives_save_and_load", message="differs", bugs=(15,), hook="moe_bias")
class SavesZeros(Sign):
    """torchtitan's first bias: what moved was not what was saved."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "b"] = torch.zeros_like(self.b)


@fault("copies_are_independent", message="changed when the original was trained", hook="moe_router")
class ReadsThroughAClosure(Top):
    """A closure over the original, which a deep copy keeps."""

    def __init__(self, spec):
        super().__init__(spec)
        self.read = lambda: self.weight

    def score(self, tokens):
        return (linear_logits(tokens.x, self.read()),)


@fault(
    "experts_can_be_added_and_removed",
    message="shape '[6]' is invalid for input of size 7",
    bugs=(29,),
    hook="moe_bias",
)
class KeepsItsSize(Sign):
    """A size as an attribute, which growth does not change."""

    def __init__(self, size):
        super().__init__(size)
        self.size = size

    def excess(self, step):
        return torch.sign(step.load - step.load.sum() / self.size).view(self.size)


@fault("compiles", message="read no number from a tensor", hook="moe_aux_loss")
def branches_on_a_number(self, routing):
    """Nothing to do while no expert is overloaded."""
    loss = routing.mean(routing.probs).square().sum()
    return loss * 2 if routing.load.max().item() > 1e6 else loss


@fault(
    "cost_is_bounded",
    message="times as long; process all tokens at once",
    hook="moe_measure",
    moe_metrics=hookimpl(lambda self: {}),
)
def takes_its_time(self, routing):
    """As slow as a loop over tokens."""
    end = time.process_time() + (0.3 if len(routing.tokens.x) > 100 else 0)
    while time.process_time() < end:
        pass
    return {"seen": routing.tokens.count.view(1)}
