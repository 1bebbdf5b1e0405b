"""New experts drawn anew."""

import attrs

from moe_engine import NewExpert, hookimpl


@attrs.define(eq=False)
class Random:
    """A newcomer has nothing of its parent: experts and router row are drawn as at the start.

    W' ~ init, w' ~ init. Its group, and what each bias copies, still come from the parent, where there is one. The
    function changes as soon as a token chooses the newcomer.

    Source: kennycason/srnn, 2025.
    """

    @hookimpl
    def moe_new_expert(self, fresh):
        return NewExpert(fresh)
