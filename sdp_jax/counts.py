"""Parameters as a polynomial in the numbers of channels that stay."""

import numpy as np

from sdp_jax.groups import Groups
from sdp_jax.polynomial import Polynomial, monomial
from sdp_jax.tracing.flops import flop_counts

__all__ = ["Polynomial", "flop_counts", "parameter_counts"]


def parameter_counts(groups: Groups) -> Polynomial:
    """The number of entries of all leaves, in the widths of the groups."""
    sizes = [d.size for d in groups]
    owners: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for number, d in enumerate(groups):
        for m in d.members:
            masks = owners.setdefault((m.path, m.axis), {})
            length = groups.shapes[m.path][m.axis]
            mask = masks.setdefault(number, np.zeros(length, bool))
            mask[m.positions(d.size)] = True
    parts = []
    for path, shape in groups.shapes.items():
        product = Polynomial.of({(): 1.0})
        for axis, length in enumerate(shape):
            masks = owners.get((path, axis), {})
            table = np.stack([*masks.values(), np.ones(length, bool)])
            columns, counts = np.unique(table, axis=1, return_counts=True)
            kept = Polynomial()
            for column, count in zip(columns.T, counts.tolist(), strict=True):
                dims = tuple(
                    d for d, is_in in zip(masks, column, strict=False) if is_in
                )
                kept = kept + monomial(dims, count, sizes)
            product = product * kept
        parts.append(product)
    return Polynomial.total(parts)
