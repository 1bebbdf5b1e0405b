"""New experts that answer zero at first."""

import attrs
import torch

from moe_engine import NewExpert, Traits, hookimpl


@attrs.define(eq=False)
class ZeroOutput:
    """A newcomer is drawn anew, but what leaves it starts at zero: F'(x) = 0.

    Its output weights learn first; its gate has no task gradient until they have moved. This keeps the
    function only where gates do not compete: with a fixed number of choices a token that takes the
    newcomer gives up another expert.

    Source: zero initialisation of a residual branch (Goyal et al., 2017), here of an expert.
    """

    traits = Traits(effects=("silent_start",))

    @hookimpl
    def moe_new_expert(self, fresh, roles):
        return NewExpert(
            {name: torch.zeros_like(row) if roles[name] == "output" else row for name, row in fresh.items()}
        )
