"""Which producers are scale-invariant, by one pass over a trace."""

import dataclasses

from sdp_jax.dimension import Member
from sdp_jax.groups import Groups
from sdp_jax.tracing import scaling_elementwise, scaling_moves
from sdp_jax.tracing.analyse import Analysis
from sdp_jax.tracing.scaling import Walk

_FOLLOW = {**scaling_elementwise.FOLLOW, **scaling_moves.FOLLOW}


def mark_invariant(found: Analysis, groups: Groups) -> Groups:
    """The same groups, in which the scale-invariant producers are marked."""
    walk = Walk(found, groups, _FOLLOW)
    invariant = walk.invariant()

    def marked(d: int, m: Member) -> Member:
        free = m.role == "producer" and (d, m.path, m.axis) in invariant
        return dataclasses.replace(m, scale_invariant=True) if free else m

    dimensions = [
        dataclasses.replace(d, members=tuple(marked(k, m) for m in d.members))
        for k, d in enumerate(groups.dimensions)
    ]
    return dataclasses.replace(groups, dimensions=tuple(dimensions))
