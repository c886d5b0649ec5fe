import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdp_jax.valley.path import PathLoss, metrics_along, on_curve, on_line, train_bend


def test_barrier_is_measured_from_the_chord():
    places = np.linspace(0, 1, 5)
    bump = np.asarray([1.0, 1.5, 4.0, 3.5, 3.0])
    assert PathLoss(places, {"loss": bump}, {}).barrier == pytest.approx(2.0)
    convex = np.asarray([1.0, 0.5, 0.5, 1.0, 3.0])
    assert PathLoss(places, {"loss": convex}, {}).barrier == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_paths_end_where_they_should(dtype):
    rng = np.random.default_rng(0)
    a, b, m = ({"w": jnp.asarray(rng.normal(size=(3, 2)), dtype)} for _ in range(3))
    chex.assert_trees_all_equal(on_line(a, b, 0.0), a)
    chex.assert_trees_all_equal(on_line(a, b, 1.0), b)
    chex.assert_trees_all_equal(on_curve(a, m, b, 0.0), a)
    chex.assert_trees_all_equal(on_curve(a, m, b, 1.0), b)
    middle = on_curve(a, m, b, 0.5)["w"]
    assert middle.dtype == dtype
    want = (a["w"] + 2 * m["w"] + b["w"]).astype(jnp.float32) / 4
    np.testing.assert_allclose(middle.astype(jnp.float32), want, atol=0.02)


def ring(params, batch):
    del batch
    return (jnp.sum(params["w"] ** 2) - 1) ** 2


def test_the_curve_follows_a_bent_valley():
    first, last = {"w": jnp.asarray([1.0, 0.0])}, {"w": jnp.asarray([0.0, 1.0])}
    seen = []
    bend = train_bend(
        ring,
        first,
        last,
        [jnp.zeros(1)] * 3,
        steps=300,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 300)),
        progress=lambda *what: seen.append(what),
    )
    assert seen[-1] == ("curve", 300, 300)
    # The best bend of a quarter circle, by symmetry on the diagonal, by a fine grid.
    t = np.linspace(0, 1, 201)[:, None]
    grid = np.linspace(0.5, 1.5, 1001)
    costs = [
        np.mean(
            (
                np.sum(
                    (
                        (1 - t) ** 2 * np.asarray([[1.0, 0]])
                        + 2 * t * (1 - t) * s
                        + t**2 * np.asarray([[0, 1.0]])
                    )
                    ** 2,
                    axis=1,
                )
                - 1
            )
            ** 2
        )
        for s in grid
    ]
    np.testing.assert_allclose(bend["w"], grid[np.argmin(costs)], atol=0.02)

    def measure(point):
        return {"loss": float(ring(point, None))}, {}

    ends = measure(first), measure(last)
    places = np.linspace(0, 1, 11)
    line, curve = (
        metrics_along(path, measure, places, ends=ends, stage="path")
        for path in (
            lambda t: on_line(first, last, t),
            lambda t: on_curve(first, bend, last, t),
        )
    )
    assert line.barrier == pytest.approx(0.25, abs=1e-6)
    assert curve.barrier < 0.01
    assert line.test == {}


def test_no_steps_leave_the_bend_half_way():
    first, last = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    bend = train_bend(ring, first, last, [jnp.zeros(1)], steps=0)
    chex.assert_trees_all_close(bend, jax.tree.map(lambda x: x / 2, last))
