"""The conformance kit: claims that every plugin of a kind must satisfy, and their tests.

    from moe_engine.testing import checks

    @pytest.mark.parametrize("check", checks("my_router"), ids=str)
    def test_my_router(check):
        check()

`check_router("my_router")` runs all of them and raises one error that lists the claims that fail;
`moe-engine check my_router` does the same on the command line. The kit does not need pytest.
docs/conformance.md lists the claims.
"""

from . import (  # noqa: F401
    biases,
    experts,
    families,
    initializers,
    layers,
    lifetime,
    losses,
    metrics,
    numerics,
    ranks,
    reports,
    routers,
    tasks,
    triggers,
)
from .checking import Check as Check
from .checking import Result as Result
from .checking import checker
from .checking import checks as checks
from .checking import results as results
from .claims import CLAIMS as CLAIMS
from .claims import Broken as Broken
from .claims import Claim as Claim
from .claims import NotApplicable as NotApplicable
from .tiny_models import tiny_checkpoint as tiny_checkpoint
from .tiny_models import tiny_model as tiny_model

check_router = checker("router")
check_bias = checker("bias")
check_loss = checker("loss")
check_growth = checker("growth")
check_initializer = checker("initializer")
check_metric = checker("metric")
check_report = checker("report")
check_task = checker("task")
check_experts = checker("experts")
check_family = checker("family")
