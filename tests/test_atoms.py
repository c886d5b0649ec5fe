"""Atoms: which positions belong together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdp_jax.tracing.atoms import Atoms, Reason, common_sizes


def classes(atoms, *groups):
    label = atoms.solve().label
    return [label[g].tolist() for g in groups]


def test_two_factorisations_are_refined():
    atoms = Atoms()
    z = atoms.fresh(24)
    a, b = atoms.fresh(2), atoms.fresh(12)
    c, d = atoms.fresh(6), atoms.fresh(4)
    atoms.conjoin(z, [a, b])
    atoms.conjoin(z, [c, d])
    solution = atoms.solve()
    # 24 = 2 · 3 · 4: the last factor of both is one of 4, the first one of 2.
    base = {int(x) for x in np.unique(solution.operands[solution.label[z]]) if x}
    assert len(base) == 2 + 3 + 4
    assert len(set(solution.label[d].tolist())) == 4


def test_factorisations_that_do_not_fit_become_one_channel():
    atoms = Atoms()
    z = atoms.fresh(12)
    atoms.conjoin(z, [atoms.fresh(3), atoms.fresh(4)])
    atoms.conjoin(z, [atoms.fresh(4), atoms.fresh(3)])
    assert len(set(classes(atoms, z)[0])) == 1


def test_a_frozen_grid_freezes_its_factors():
    atoms = Atoms()
    z, a, b = atoms.fresh(6), atoms.fresh(2), atoms.fresh(3)
    atoms.conjoin(z, [a, b])
    atoms.freeze(z[:3], Reason("test", "asked to"))
    assert classes(atoms, a[:1], b) == [[0], [0, 0, 0]]
    label = atoms.solve().label
    assert label[a[1]] != 0 and label[a[1]] == label[z[3]]


def test_a_class_defined_through_itself_is_one():
    atoms = Atoms()
    z, x, y = atoms.fresh(4), atoms.fresh(2), atoms.fresh(2)
    atoms.conjoin(z, [x, y])
    atoms.equate(x, z[:2])
    # x[0] = x[0] ∧ y[0] holds only for y[0] = x[0] or coarser.
    solution = atoms.solve()
    assert (solution.operands[solution.label[x], 0] == solution.label[x]).all()
    assert solution.label[x[0]] == solution.label[y[0]]


@given(
    a=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    b=st.lists(st.integers(2, 5), min_size=1, max_size=3),
)
def test_common_sizes_refine_both(a, b):
    if np.prod(a) != np.prod(b):
        a = b
    common = common_sizes(a, b)
    if common is None:
        return
    assert np.prod(common) == np.prod(a)
    ends = set(np.cumprod(common[::-1]).tolist())
    assert set(np.cumprod(a[::-1]).tolist()) <= ends
    assert set(np.cumprod(b[::-1]).tolist()) <= ends
