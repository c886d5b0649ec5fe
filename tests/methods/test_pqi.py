"""The PQ Index against NumPy, and the axioms of sparsity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import sdp_jax
from sdp_jax import methods
from tests import toy
from tests.toy import pq_reference as reference

SETTINGS = [(0.5, 1.0), (1.0, 2.0), (0.2, 0.7)]


computed = jax.jit(methods.pq_index, static_argnums=(1, 2))


def index(w, p=0.5, q=1.0):
    return float(computed(jnp.asarray(w), p, q))


vectors = st.lists(st.floats(0.01, 10), min_size=5, max_size=5).map(np.asarray)


@pytest.mark.parametrize(("p", "q"), [*SETTINGS, (0.1, 2.0)])
def test_the_index_is_its_definition(p, q):
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 1000):
        w = rng.normal(size=size) * (rng.random(size) < 0.8)
        np.testing.assert_allclose(index(w, p, q), reference(w, p, q), atol=3e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(index(w, p, q), reference(w, p, q), atol=1e-12)


@pytest.mark.parametrize(("p", "q"), SETTINGS)
def test_bounds_are_reached(p, q):
    assert index(np.full(13, 0.3), p, q) == 0
    w = np.zeros(13)
    w[4] = -2.0
    np.testing.assert_allclose(index(w, p, q), 1 - 13 ** (1 / q - 1 / p), rtol=1e-6)
    assert index(np.zeros(5), p, q) == 0
    assert index(np.zeros((0,)), p, q) == 0
    assert np.isnan(index(np.array([1.0, np.nan]), p, q))


@given(w=vectors, part=st.floats(0.05, 0.45), setting=st.sampled_from(SETTINGS))
def test_robin_hood_lowers_it(w, part, setting):
    rich, poor = w.argmax(), w.argmin()
    assume(w[rich] > 1.1 * w[poor])
    other = w.copy()
    other[rich] -= part * (w[rich] - w[poor])
    other[poor] += part * (w[rich] - w[poor])
    with jax.enable_x64(True):
        assert index(other, *setting) < index(w, *setting)


@given(w=vectors, scale=st.floats(1e-6, 1e6), setting=st.sampled_from(SETTINGS))
def test_scaling_does_not_change_it(w, scale, setting):
    np.testing.assert_allclose(
        index(-scale * w, *setting), index(w, *setting), atol=5e-6
    )


@given(w=vectors, tide=st.floats(0.1, 10), setting=st.sampled_from(SETTINGS))
def test_a_rising_tide_lowers_it(w, tide, setting):
    assume(w.max() > 1.1 * w.min())
    with jax.enable_x64(True):
        assert index(w + tide, *setting) < index(w, *setting)


@given(w=vectors, copies=st.sampled_from([2, 3]), setting=st.sampled_from(SETTINGS))
def test_cloning_does_not_change_it(w, copies, setting):
    clones = np.tile(w, copies)
    np.testing.assert_allclose(index(clones, *setting), index(w, *setting), atol=5e-6)


@given(w=vectors, setting=st.sampled_from(SETTINGS))
def test_bill_gates_raises_it(w, setting):
    # Beyond some wealth of one, more of it makes the whole sparser.
    with jax.enable_x64(True):
        values = []
        for wealth in (1e3, 1e4, 1e5):
            other = w.copy()
            other[0] += wealth
            values.append(index(other, *setting))
    assert values[0] < values[1] < values[2]


@given(w=vectors, babies=st.sampled_from([1, 3]), setting=st.sampled_from(SETTINGS))
def test_babies_raise_it(w, babies, setting):
    with jax.enable_x64(True):
        assert index(np.append(w, np.zeros(babies)), *setting) > index(w, *setting)


def test_no_more_numbers_are_large_than_the_bound_says():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(2, 30))
        w = np.abs(rng.normal(size=size)) ** rng.uniform(0.5, 4)
        p = rng.uniform(0.1, 1)
        q = p + rng.uniform(0.1, 1.5)
        ordered = np.sort(w**p)[::-1]
        found = reference(w, p, q)
        for r in range(1, size + 1):
            eta = ordered[r:].sum() / ordered[:r].sum()
            bound = methods.pq_bound(found, size, p, q, eta)
            assert r >= bound - 1e-9
            expected = size * (1 + eta) ** (-q / (q - p))
            expected *= (1 - found) ** (q * p / (q - p))
            np.testing.assert_allclose(bound, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("p", "q", "value", "share"), [(0.5, 1.0, 0.153, 0.153), (1.0, 2.0, 0.202, 0.364)]
)
def test_gaussian_weights(p, q, value, share):
    w = np.random.default_rng(0).normal(size=400_000)
    found = methods.pq_index(w, p, q)
    assert abs(float(found) - value) < 2e-3
    count = methods.prune_count(float(found), w.size, p, q)
    assert isinstance(count, np.integer)
    assert abs(count / w.size - share) < 2e-3


def test_the_count_is_that_of_the_algorithm():
    cases = [
        (0.3, 100, 0.5, 1.0, 0.0, 1.0, 0.9),
        (0.3, 100, 0.5, 1.0, 0.5, 1.0, 0.9),
        (0.3, 101, 1.0, 2.0, 0.0, 3.0, 0.9),
        (0.1, 57, 1.0, 1.4, 0.1, 0.5, 0.25),
        (0.0, 57, 0.5, 1.0, 0.0, 9.0, 0.9),
    ]
    for i, d, p, q, eta, gamma, beta in cases:
        bound = d * (1 + eta) ** (-q / (q - p)) * (1 - i) ** (q * p / (q - p))
        r = np.ceil(bound)
        expected = np.floor(d * min(max(gamma * (1 - r / d), 0), beta))
        assert methods.prune_count(i, d, p, q, eta, gamma, beta) == expected
    # No rounding where whole numbers divide badly: 9 of 10 stay, one goes.
    assert methods.prune_count(0.1, 10) == 1
    assert methods.prune_count(0.5, 0) == 0
    counted = jax.jit(methods.prune_count)(jnp.array([0.25, 0.0]), jnp.array([8, 4]))
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, [2, 0])


def test_numbers_far_from_one():
    w = np.float32([1e20, 1e20, 1e-20, 0])
    for p, q in (*SETTINGS, (0.1, 2.0)):
        expected = reference(w.astype(float), p, q)
        np.testing.assert_allclose(index(w, p, q), expected, rtol=1e-5)
        for scale in (1e20, 1e-20):
            values = np.float32([1, 2, 3]) * np.float32(scale)
            expected = reference([1, 2, 3], p, q)
            np.testing.assert_allclose(index(values, p, q), expected, atol=2e-6)
    params = {"w": jnp.float32([[1, 2], [1, 2]]) * 1e-20}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    found = methods.pq_index(params, groups=groups, scope="dimension", of="norms")
    np.testing.assert_allclose(found["d"], reference([1, 2], 0.5, 1), rtol=1e-5)


def test_half_precision_is_summed_in_float32():
    w = jnp.asarray(np.random.default_rng(0).normal(size=5000), jnp.bfloat16)
    found = methods.pq_index(w)
    assert found.dtype == jnp.float32
    expected = reference(w.astype(jnp.float32), 0.5, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_scopes(masked):
    params = jax.device_get(toy.mlp_params())
    groups = toy.mlp_groups(params)
    rng = np.random.default_rng(3)
    mask = None
    if masked:
        mask = jax.tree.map(lambda x: rng.random(x.shape) < 0.5, params)
        mask["layer0"]["kernel"][:, 2] = False
        mask["layer0"]["bias"][2] = False
    full = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    alive = jax.tree.map(np.asarray, mask) if masked else full

    def of(*pairs):
        values = [np.asarray(w)[np.asarray(m)] for w, m in pairs]
        return reference(np.concatenate([np.ravel(v) for v in values]), 1, 2)

    def compute(**options):
        compiled = jax.jit(functools.partial(methods.pq_index, **options))
        return jax.device_get(compiled(params, 1.0, 2.0, mask=mask))

    close = dict(atol=3e-6)
    leaves, masks = (jax.tree.leaves(t) for t in (params, alive))
    np.testing.assert_allclose(compute(), of(*zip(leaves, masks, strict=True)), **close)
    tensors = compute(scope="tensor")
    assert jax.tree.structure(tensors) == jax.tree.structure(params)
    for value, *pair in zip(jax.tree.leaves(tensors), leaves, masks, strict=True):
        np.testing.assert_allclose(value, of(pair), **close)

    for axis in (-1, 0):
        rows = compute(scope="row", axis=axis)
        kernel, part = np.asarray(params["layer1"]["kernel"]), alive["layer1"]["kernel"]
        for i in range(kernel.shape[axis]):
            pair = np.take(kernel, i, axis), np.take(part, i, axis)
            found = rows["layer1"]["kernel"][i]
            np.testing.assert_allclose(found, of(pair), **close)
    assert compute(scope="row")["layer1"]["bias"].shape == (5,)

    dimensions = compute(groups=groups, scope="dimension")
    channels = groups.split(compute(groups=groups, scope="channel"))
    norms = compute(groups=groups, scope="dimension", of="norms")
    everything = []
    for i, size in enumerate((6, 5)):
        layer, part = params[f"layer{i}"], alive[f"layer{i}"]
        name = f"hidden{i}"
        pairs = [(layer[k], part[k]) for k in ("kernel", "bias")]
        everything += pairs
        np.testing.assert_allclose(dimensions[name], of(*pairs), **close)
        assert channels[name].shape == (size,)
        lengths = []
        for c in range(size):
            pairs = [
                (np.asarray(w)[..., c], m[..., c]) for w, m in pairs_of(layer, part)
            ]
            np.testing.assert_allclose(channels[name][c], of(*pairs), **close)
            if any(np.any(m) for _, m in pairs):
                lengths.append(np.sqrt(sum(np.sum((w * m) ** 2) for w, m in pairs)))
        assert len(lengths) == size - (masked and i == 0)
        np.testing.assert_allclose(norms[name], reference(lengths, 1, 2), **close)
    np.testing.assert_allclose(compute(groups=groups), of(*everything), **close)


def pairs_of(layer, part):
    return [(layer[k], part[k]) for k in ("kernel", "bias")]


def test_repeated_channels_and_jit():
    params = {"w": jnp.arange(1.0, 13.0).reshape(2, 6)}
    # Two heads of three channels: channel c sits at c and c + 3.
    axes = {"heads": [sdp_jax.Member("w", 1, outer=2)]}
    groups = sdp_jax.groups_from_axes(params, axes)
    found = jax.jit(lambda p: methods.pq_index(p, groups=groups, scope="channel"))(
        params
    )
    w = np.asarray(params["w"])
    expected = [reference(w[:, [c, c + 3]], 0.5, 1) for c in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1.0, "q": 1.0}, ValueError, "0 < p < q"),
        ({"p": 0.0}, ValueError, "0 < p < q"),
        ({"p": "a"}, TypeError, "positive number"),
        ({"scope": "channel"}, ValueError, "without groups"),
        ({"scope": "layer"}, ValueError, "scope must be"),
        ({"of": "norms"}, ValueError, "needs groups"),
        ({"of": "norm"}, ValueError, "of must be"),
        ({"mask": {"w": np.ones(3, bool)}}, ValueError, "structure and the shapes"),
        ({"mask": np.ones(3)}, TypeError, "Boolean"),
        ({"mask": np.ones(2, bool)}, ValueError, "shapes"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        methods.pq_index(np.ones(3), **options)


def test_bad_input_with_groups_and_counts():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    with pytest.raises(ValueError, match="with groups"):
        methods.pq_index(params, groups=groups, scope="row")
    with pytest.raises(ValueError, match="one channel"):
        methods.pq_index(params, groups=groups, scope="channel", of="norms")
    with pytest.raises(TypeError, match=r"sdp_jax\.Groups"):
        methods.pq_index(params, groups={})
    with pytest.raises(ValueError, match="eta"):
        methods.pq_bound(0.1, 3, eta=-1.0)
    with pytest.raises(ValueError, match="beta"):
        methods.prune_count(0.1, 3, beta=1.0)
    with pytest.raises(ValueError, match="gamma"):
        methods.prune_count(0.1, 3, gamma=-1.0)


def test_odd_leaves():
    assert methods.pq_index({"a": jnp.zeros((3, 0))}, scope="row")["a"].shape == (0,)
    index = methods.pq_index(jnp.array([-128, 127], jnp.int8))
    assert 0 <= float(index) < 1e-4
