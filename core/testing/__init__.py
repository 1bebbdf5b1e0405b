"""The conformance kit: what moe-engine promises of a plugin, as claims that any plugin can be held against.

    from moe_engine.testing import checks

    @pytest.mark.parametrize("check", checks("my_router"), ids=str)
    def test_my_router(check):
        check()

or `check_router("my_router")`, which raises one error that lists every claim that fails, or on the command
line `moe-engine check my_router`. The kit needs no pytest. docs/conformance.md lists the claims.
"""

from functools import partial

from . import (  # noqa: F401
    biases,
    experts,
    initializers,
    layers,
    lifetime,
    losses,
    metrics,
    numerics,
    reports,
    routers,
    tasks,
    triggers,
)
from .checking import Check as Check
from .checking import Result as Result
from .checking import check
from .checking import checks as checks
from .checking import results as results
from .claims import CLAIMS as CLAIMS
from .claims import Broken as Broken
from .claims import Claim as Claim
from .claims import NotApplicable as NotApplicable

check_router = partial(check, "router")
check_bias = partial(check, "bias")
check_loss = partial(check, "loss")
check_growth = partial(check, "growth")
check_initializer = partial(check, "initializer")
check_metric = partial(check, "metric")
check_report = partial(check, "report")
check_task = partial(check, "task")
check_experts = partial(check, "experts")
