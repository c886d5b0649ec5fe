"""Atoms: which positions belong together."""

import numpy as np
import pytest
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


@pytest.mark.parametrize("seed", range(4))
def test_blocks_and_single_atoms_are_merged_alike(seed):
    """Against sets that are joined one by one."""
    rng = np.random.default_rng(seed)
    atoms = Atoms()
    blocks = [atoms.fresh(int(n)) for n in rng.choice([3, 4, 6], 12)]
    sets = [{k} for k in range(atoms.count)]

    def join(x, y):
        joined = sets[x] | sets[y]
        for k in joined:
            sets[k] = joined

    for _ in range(9):
        a, b = (blocks[k] for k in rng.choice(12, 2, replace=False))
        size = min(len(a), len(b))  # Often a part of a block.
        a, b = (x[:size] if rng.random() < 0.7 else x[-size:][::-1] for x in (a, b))
        atoms.equate(a, b)
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            join(x, y)
    atoms.freeze(blocks[0][:1], Reason("test", "whole"))
    join(0, int(blocks[0][0]))
    label = atoms.solve().label
    for x in range(atoms.count):
        assert set(np.flatnonzero(label == label[x]).tolist()) == sets[x]
    assert label[0] == 0 and set(label.tolist()) == set(range(label.max() + 1))
