"""The families of transformers models whose MoE blocks can be watched: how each decides, and where that is seen.

Suffixes: T tokens, E experts, K chosen per token, D model.
"""

from collections.abc import Callable, Iterable
from typing import Any

import attrs
from torch import Tensor, nn

from ..contract.routing import Spec
from ..errors import UsageError

Strategy = tuple[str, dict[str, Any]]  # a router plugin and its options


@attrs.frozen
class Family:
    """How the MoE blocks of a family decide.

    block: the class of the blocks; their subclasses belong to it, too. decides_like(block, top_k): the strategy that
    makes the same choices and gates from the same logits, or None. sigmoid: scores are sigmoids instead of a softmax.
    router, experts: the block's submodules. The router returns the logits [T, E], or a tuple that begins with them;
    the experts are given the hidden states, the chosen experts and their weights.
    """

    name: str
    block: str
    decides_like: Callable[["Block", int], Strategy | None]
    sigmoid: bool = False
    router: str = "gate"
    experts: str = "experts"


@attrs.frozen(eq=False)
class Block:
    """A MoE block of a model, by its name there."""

    name: str
    module: nn.Module
    family: Family

    @property
    def router(self) -> Any:
        """The router, without adapters around it."""
        return _unwrapped(getattr(self.module, self.family.router))

    @property
    def bias(self) -> Tensor | None:
        """The bias [E] that DeepSeek-V3 adds to its scores to select experts."""
        bias: Tensor | None = getattr(self.router, "e_score_correction_bias", None)
        return bias

    def setting(self, *names: str) -> Any:
        """A setting by either name: versions of transformers keep it in the router or in the block."""
        owners = (self.router, self.module)
        return next((getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)), None)

    def spec(self, classes: int | None = None) -> Spec:
        """The block's sizes. classes: the number of labels."""
        experts, dim = self.router.weight.shape
        hidden = getattr(_unwrapped(getattr(self.module, self.family.experts)), "intermediate_dim", 0)
        return Spec(
            dim,
            hidden,
            experts=experts,
            top_k=self.setting("top_k"),
            activation="swiglu",
            causal=True,
            classes=classes,
        )


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of known families in a model, in order."""
    return [
        Block(name or type(module).__name__, module, family)
        for name, module in model.named_modules()
        if (family := _family_of(module)) is not None
    ]


def _family_of(module: nn.Module) -> Family | None:
    classes = {kind.__name__ for kind in type(module).__mro__}
    return next((family for family in FAMILIES if family.block in classes), None)


def _unwrapped(module: Any) -> Any:
    """The module inside adapters, which keep what they adapt as `base_layer` (PEFT)."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


# -- what routers return and experts are given ----------------------------------------------------------


def logits_from(returned: Any, experts: int) -> Tensor:
    """The logits [T, E] in what a router returned: a tensor, or a tuple that begins with it."""
    logits: Tensor = returned[0] if isinstance(returned, tuple | list) else returned
    return logits.detach().reshape(-1, experts).float()


def are_probabilities(logits_TE: Tensor) -> bool:
    """Whether every row is a distribution: before transformers 5.10 some routers returned softmax(logits) as logits."""
    near_T = (logits_TE.sum(-1) - 1).abs() < 1e-5
    return bool(((logits_TE >= 0).all(-1) & near_T).all())


def multiplied(router: Any, x_TD: Tensor) -> Tensor:
    """The logits [T, E] of a block that multiplies by its router's weight itself (DeepSeek-V2 before 5.16)."""
    return nn.functional.linear(x_TD.detach().float(), router.weight.detach().float())


def decision_in(block: Block, given: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states [T, D], the choices [T, K] and their gates [T, K] among what a block's experts are given.

    Their names differ between families and versions. Raises UsageError.
    """
    tensors = [value.detach() for value in given if isinstance(value, Tensor)]
    choices = [value for value in tensors if not value.is_floating_point()]
    floating = [value for value in tensors if value.is_floating_point()]
    if len(choices) != 1 or len(floating) != 2 or choices[0].shape != floating[1].shape:
        raise UsageError(
            f"the experts of {block.name} ({type(block.module).__name__}) are not given hidden states, chosen experts "
            f"and their weights, as those of {block.family.name} are; close the watcher to run this model",
            code="unknown-decision",
        )
    return floating[0].flatten(0, -2), choices[0], floating[1]


# -- strategies that decide alike -----------------------------------------------------------------------


def _softmax(renorm: bool, top_k: int, **options: Any) -> Strategy:
    return "topk", {**_renorm(renorm, top_k), **options}


def _renorm(renorm: bool, top_k: int) -> dict[str, bool]:
    """With one expert it is left unset: a gate that is the constant 1 changes no choice, and routers refuse it."""
    return {"renorm": renorm} if top_k > 1 else {}


def _always_renormalised(_: Block, top_k: int) -> Strategy:
    return _softmax(True, top_k)


def _renormalised_if_set(block: Block, top_k: int) -> Strategy:
    return _softmax(bool(block.setting("norm_topk_prob")), top_k)


def _groups(block: Block, score: str) -> dict[str, Any]:
    """The options for groups, which do not matter if all are kept."""
    groups, kept = block.setting("num_group", "n_group"), block.setting("topk_group")
    return {} if groups == kept else {"groups": groups, "groups_kept": kept, "group_score": score}


def _deepseek_v2(block: Block, top_k: int) -> Strategy | None:
    method = block.setting("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        return None
    groups = _groups(block, "max") if method == "group_limited_greedy" else {}
    return _softmax(False, top_k, scale=float(block.setting("routed_scaling_factor")), **groups)


def _deepseek_v3(block: Block, top_k: int) -> Strategy:
    scale = {"scale": float(block.setting("routed_scaling_factor"))}
    renorm = _renorm(bool(block.setting("norm_topk_prob")), top_k)
    return "sigmoid_topk", {**renorm, **scale, **_groups(block, "top2")}


FAMILIES = (
    Family("Mixtral", "MixtralSparseMoeBlock", _always_renormalised),
    Family("OLMoE", "OlmoeSparseMoeBlock", _renormalised_if_set),
    Family("Qwen2-MoE", "Qwen2MoeSparseMoeBlock", _renormalised_if_set),
    Family("Qwen3-MoE", "Qwen3MoeSparseMoeBlock", _renormalised_if_set),
    Family("DeepSeek-V2", "DeepseekV2Moe", _deepseek_v2),
    Family("DeepSeek-V3", "DeepseekV3MoE", _deepseek_v3, sigmoid=True),
)
