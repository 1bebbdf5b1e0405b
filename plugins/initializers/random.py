import attrs

from moe_engine import NewExpert, hookimpl


@attrs.define(eq=False)
class Random:
    """Draw the new expert from scratch.

    W' ~ init, w' ~ init: nothing is taken from the parent except its group and what each bias copies. The function
    changes as soon as a token chooses the new expert.

    Source: kennycason/srnn, 2025.
    """

    @hookimpl
    def moe_new_expert(self, fresh):
        return NewExpert(fresh)
