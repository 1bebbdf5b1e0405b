import attrs
import torch

from moe_engine import NewExpert, Traits, hookimpl


@attrs.define(eq=False)
class ZeroOutput:
    """Draw the new expert from scratch, with zero output.

    F'(x) = 0 at first. The output weights learn first; the gate has no task gradient until they have moved. This
    keeps the function only where gates do not compete: with a fixed number of choices, a token that takes the new
    expert gives up another one.

    Source: Goyal et al., 2017 (zero initialisation of a residual branch), here for an expert.
    """

    traits = Traits(effects=("silent_start",))

    @hookimpl
    def moe_new_expert(self, fresh, roles):
        return NewExpert(
            {name: torch.zeros_like(row) if roles[name] == "output" else row for name, row in fresh.items()}
        )
