"""States that go in and out, features beside logits: small as the channels are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import promise

RNG = np.random.default_rng(0)
SHAPES = {"x": (5, 32), "r": (4, 32), "b": (32,), "project": (8, 4), "head": (4, 3)}
STATE = ("0/*",)


def draw(sizes):
    return {k: jnp.asarray(0.6 * RNG.normal(size=n)) for k, n in sizes.items()}


def stream(p, state, x):
    """A step of an LSTM with projection: the caller keeps the state."""
    c, r = state
    i, f, g, o = jnp.split(x @ p["x"] + r @ p["r"] + p["b"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    r = (jax.nn.sigmoid(o) * jnp.tanh(c)) @ p["project"]
    return (c, r), r @ p["head"]


def sequence(p, xs):
    state = jnp.zeros((2, 8)), jnp.zeros((2, 4))
    return jax.lax.scan(lambda s, x: stream(p, s, x), state, xs)[1]


def sized(groups):
    return {(p.path, p.axis, p.role): len(p.channels) for p in groups.ports}


def test_a_small_network_streams_with_a_small_state(x64):
    params, xs = draw(SHAPES), jnp.asarray(RNG.normal(size=(3, 2, 5)))
    state = jnp.zeros((2, 8)), jnp.zeros((2, 4))
    groups = sdp_jax.find_groups(
        stream, params, state, xs[0], prune_inputs=STATE, prune_outputs=STATE
    )
    # The same channels, made by the same leaves, as with the state inside.
    assert groups.dimensions == sdp_jax.find_groups(sequence, params, xs).dimensions
    assert sized(groups) == {
        ("0/0", 1, "carry"): 8,
        ("0/1", 1, "carry"): 4,
        ("0/0", 1, "output"): 8,
        ("0/1", 1, "output"): 4,
    }
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups
    cut = promise.random_cut(groups, 0.5, 0)
    zeroed, small = cut.zero(params), cut.take(params)
    want = sequence(zeroed, xs)
    promise.close(sdp_jax.narrow(sequence, cut)(small, xs), want, 1e-12)
    step = jax.jit(sdp_jax.narrow(stream, cut))
    (now,) = cut.take_inputs(state)
    for x, y in zip(xs, want, strict=True):
        now, found = step(small, now, x)
        assert jax.tree.map(jnp.shape, now) == ((2, 4), (2, 2))
        promise.close(found, y, 1e-12)
    # Cut once more, it streams on.
    again = promise.random_cut(cut.groups, 0.5, 1)
    now, found = sdp_jax.narrow(sdp_jax.narrow(stream, cut), again)(
        again.take(small), *again.take_inputs(now, xs[0])
    )
    assert jax.tree.map(jnp.shape, now) == ((2, 2), (2, 1))


def test_prune_checks_and_reports_a_state_from_anywhere(x64):
    params, x = draw(SHAPES), jnp.asarray(RNG.normal(size=(2, 5)))
    state = draw({"c": (2, 8), "r": (2, 4)})

    def fn(p, x, state):
        (c, r), y = stream(p, (state["c"], state["r"]), x)
        return {"y": y, "state": {"c": c, "r": r}}

    where = {"prune_inputs": ("1/*",), "prune_outputs": ("state/*",)}
    groups = sdp_jax.find_groups(fn, params, x, state, **where)
    cut = promise.random_cut(groups, 0.5, 2)
    pruned = sdp_jax.prune(fn, params, x, state, cut=cut)
    assert "1/c[1] (carry)" in str(pruned)
    report = pruned.report(x, state, repeats=1)
    assert report.difference < 1e-12
    assert "1/c[1] (carry)" in str(report)
    dense = fn(cut.zero(params), *cut.zero_inputs(x, state))
    found = pruned(*cut.take_inputs(x, state))
    promise.close(found["y"], dense["y"], 1e-12)
    small = cut.take_inputs(x, state)
    by_name = pruned(state=small[1], x=small[0])
    promise.close(by_name["y"], dense["y"], 1e-12)
    kept = np.asarray(cut.kept[0])
    promise.close(found["state"]["c"], dense["state"]["c"][:, kept], 1e-12)
    with pytest.raises(ValueError, match="takes small|were zero") as caught:
        pruned(x, state)
    assert "take_inputs" in str(caught.value.__notes__)
    with pytest.raises(ValueError, match=r"expected along its axes the lengths \{1: 8"):
        cut.take_inputs(x, {"c": x, "r": state["r"]})


def test_a_state_that_does_not_stay_zero_is_whole():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}

    def fn(p, h, x):
        h = jax.nn.sigmoid(x @ p["w"]) + h
        return h, h @ p["v"]

    groups = sdp_jax.find_groups(
        fn,
        params,
        jnp.zeros((1, 4)),
        jnp.ones((1, 3)),
        prune_inputs=("0",),
        prune_outputs=("0",),
    )
    assert not len(groups)
    assert "output: is handed on, and does not stay zero" in str(groups)


def test_a_small_state_that_nobody_has_named_is_told_how(x64):
    params, xs = draw(SHAPES), jnp.asarray(RNG.normal(size=(3, 2, 5)))
    cut = promise.random_cut(sdp_jax.find_groups(sequence, params, xs), 0.5, 0)
    state = jnp.zeros((2, 4)), jnp.zeros((2, 2))
    with pytest.raises(TypeError, match="contracting") as caught:
        sdp_jax.narrow(stream, cut)(cut.take(params), state, xs[0])
    assert "prune_inputs= and prune_outputs=" in caught.value.__notes__[-1]


def test_features_shrink_beside_logits_that_stay(x64):
    params = draw({"a": (5, 8), "b": (8, 10), "c": (10, 3)})
    x = jnp.asarray(RNG.normal(size=(2, 5)))

    def fn(p, x):
        hidden = jax.nn.relu(x @ p["a"])
        deep = jax.nn.relu(hidden @ p["b"])
        return {"logits": deep @ p["c"], "hidden": hidden, "deep": deep, "in": x[:, 1:]}

    groups = sdp_jax.find_groups(fn, params, x, prune_outputs=("hidden", "deep"))
    assert groups.sizes == {"a": 8, "b": 10}
    pruned = sdp_jax.prune(
        fn, params, x, cut=(cut := promise.random_cut(groups, 0.5, 0))
    )
    dense = fn(cut.zero(params), x)
    for name, out in pruned(x).items():
        promise.close(out, cut.take_output(name, dense[name]), 1e-12)
    assert [pruned(x)[k].shape[1] for k in dense] == [3, 4, 5, 4]
    less = groups.without("a")
    assert {(p.path, p.axis) for p in less.ports} == {("deep", 1)}
    assert {c for p in less.ports for row in p.channels for c in row} == set(range(10))


def test_bad_patterns_are_refused():
    def find(**kw):
        fn, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((3, 4))}
        return sdp_jax.find_groups(fn, params, jnp.ones((1, 3)), **kw)

    with pytest.raises(TypeError, match="prune_inputs must be a sequence of patterns"):
        find(prune_inputs="0")
    with pytest.raises(ValueError, match="prune_inputs pattern '1' matches none of"):
        find(prune_inputs=("1",))
    with pytest.raises(ValueError, match="prune_outputs pattern 'y' matches none of"):
        find(prune_outputs=("y",))
    groups = find(prune_inputs=True)
    text = groups.to_json().replace('"role": "input"', '"role": "door"')
    with pytest.raises(ValueError, match="role 'door' is not one of"):
        sdp_jax.Groups.from_json(text)
