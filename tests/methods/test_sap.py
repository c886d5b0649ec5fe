"""Iterative pruning against the algorithm in NumPy, line by line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy


def drift(number, params, mask):
    """A training that moves everything, but nothing that is masked."""
    rng = np.random.default_rng(number)

    def move(p, m):
        p = np.asarray(p)
        step = (0.5 * rng.normal(size=p.shape)).astype(p.dtype)
        return jnp.asarray(np.where(m, p * 1.1 + step, 0))

    return jax.tree.map(move, params, mask)


class Trainer:
    def __init__(self, first=0):
        self.number, self.starts = first, []

    def __call__(self, params, mask):
        self.starts.append(params)
        self.number += 1
        return drift(self.number - 1, params, mask)


def index(w, p, q):
    w = np.abs(np.asarray(w, np.float64))
    if len(w) == 0 or w.max() == 0:
        return 0.0
    d = len(w)
    first, second = np.sum(w**p) ** (1 / p), np.sum(w**q) ** (1 / q)
    return 1 - d ** (1 / q - 1 / p) * first / second


def budget(w, p, q, eta, gamma, beta):
    """Lines 3 to 5 of the algorithm."""
    d = len(w)
    if d == 0:
        return 0
    r = d * (1 + eta) ** (-q / (q - p))
    r = np.ceil(r * (1 - index(w, p, q)) ** (q * p / (q - p)))
    return int(np.floor(d * min(max(gamma * (1 - r / d), 0), beta) + 1e-9))


def threshold(w, count):
    """Line 6: the (c + 1)-th smallest magnitude."""
    return np.sort(np.abs(w))[count] if len(w) else np.inf


def by_hand(params, rounds, scope, count, rank="latest", rewind=True):
    """The loop on weights; ``count(alive weights)`` tells how many go."""
    matrices = [(k, "kernel") for k in params]
    masks = {k: np.ones(params[k][n].shape, bool) for k, n in matrices}
    out, start, first = [], params, None
    for t in range(rounds + 1):
        mask = {
            k: {"kernel": masks[k], "bias": np.ones(len(params[k]["bias"]), bool)}
            for k in params
        }
        begun = {
            k: {n: np.where(mask[k][n], start[k][n], 0) for n in mask[k]} for k in start
        }
        trained = drift(t, begun, mask)
        first = trained if first is None else first
        ranked = first if rank == "first" else trained
        w = {k: np.asarray(ranked[k]["kernel"]) for k, _ in matrices}
        new = {k: m.copy() for k, m in masks.items()}
        if scope == "global":
            alive = np.concatenate([w[k][masks[k]] for k in w])
            measured = [np.asarray(trained[k]["kernel"])[masks[k]] for k in w]
            level = threshold(alive, count(np.concatenate(measured)))
            for k in w:
                new[k] &= np.abs(w[k]) >= level
        for k in w if scope != "global" else ():
            columns = range(w[k].shape[1]) if scope == "row" else [slice(None)]
            for c in columns:
                m = masks[k][:, c]
                level = threshold(w[k][:, c][m], count(w[k][:, c][m]))
                new[k][:, c] &= np.abs(w[k][:, c]) >= level
        out.append((mask, trained, new))
        masks = new
        start = start if rewind else trained
    return out


SETTINGS = [
    ("global", 0.5, 1.0, 0.0, 1.0, 0.9, True),
    ("global", 1.0, 2.0, 0.05, 1.0, 0.3, False),
    ("tensor", 0.5, 1.0, 0.0, 2.0, 0.9, True),
    ("row", 1.0, 2.0, 0.0, 1.5, 0.5, True),
]


@pytest.mark.parametrize(
    ("scope", "p", "q", "eta", "gamma", "beta", "rewind"), SETTINGS
)
def test_sap_is_the_algorithm(x64, scope, p, q, eta, gamma, beta, rewind):
    params = toy.mlp_params(dtype=jnp.float64)
    expected = by_hand(
        params,
        3,
        scope,
        lambda w: budget(w, p, q, eta, gamma, beta),
        rewind=rewind,
    )
    trainer = Trainer()
    done = list(
        methods.pruning_rounds(
            trainer,
            params,
            methods.sap(eta, gamma, beta),
            rounds=3,
            p=p,
            q=q,
            scope=scope,
            rewind=rewind,
        )
    )
    assert [r.round for r in done] == [0, 1, 2, 3] and trainer.number == 4
    assert done[-1].next_mask is None
    sizes = []
    for found, (mask, trained, _) in zip(done, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.mask, mask)
        jax.tree.map(np.testing.assert_array_equal, found.params, trained)
        alive = [m["kernel"] for m in mask.values()]
        share = sum(m.sum() for m in alive) / sum(m.size for m in alive)
        np.testing.assert_allclose(found.kept, share)
        sizes.append(share)
        kernels = [np.asarray(trained[k]["kernel"]) for k in trained]
        if scope == "global":
            value = index(
                np.concatenate([w[m] for w, m in zip(kernels, alive, strict=True)]),
                p,
                q,
            )
            np.testing.assert_allclose(found.index, value, atol=1e-12)
        elif scope == "tensor":
            value = index(kernels[1][alive[1]], p, q)
            np.testing.assert_allclose(found.index["layer1/kernel"], value, atol=1e-12)
        else:
            value = [
                index(w[m], p, q) for w, m in zip(kernels[1].T, alive[1].T, strict=True)
            ]
            np.testing.assert_allclose(found.index["layer1/kernel"], value, atol=1e-12)
    assert sizes[0] == 1 and all(np.diff(sizes) < 0)
    for before, after in zip(done[:-1], done[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, before.next_mask, after.mask)
    if rewind:
        chosen = methods.apply_mask(params, done[2].mask)
        jax.tree.map(np.testing.assert_array_equal, trainer.starts[2], chosen)


@pytest.mark.parametrize("rank", ["latest", "first"])
def test_baselines(x64, rank):
    params = toy.mlp_params(dtype=jnp.float64)
    rule = methods.lottery_ticket if rank == "latest" else methods.one_shot
    expected = by_hand(params, 3, "global", lambda w: int(0.3 * len(w)), rank)
    done = list(methods.pruning_rounds(Trainer(), params, rule(0.3), rounds=3))
    for found, (mask, trained, _) in zip(done, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.mask, mask)
        jax.tree.map(np.testing.assert_array_equal, found.params, trained)


def channels_by_hand(params, rounds, count, whole, floor):
    """The same on norms of channels, one dimension after the other or together."""
    alive = {"hidden0": np.ones(6, bool), "hidden1": np.ones(5, bool)}
    out = []
    for t in range(rounds + 1):
        mask = {
            k: {n: np.ones(x.shape, bool) for n, x in layer.items()}
            for k, layer in params.items()
        }
        for i, live in enumerate(alive.values()):
            mask[f"layer{i}"]["kernel"][:, ~live] = False
            mask[f"layer{i}"]["bias"][~live] = False
        begun = jax.tree.map(lambda m, p: np.where(m, p, 0), mask, params)
        trained = drift(t, begun, mask)
        norms = {}
        for i, name in enumerate(alive):
            layer = jax.tree.map(np.asarray, trained[f"layer{i}"])
            square = (layer["kernel"] ** 2).sum(0) + layer["bias"] ** 2
            norms[name] = np.sqrt(square)
        new = {k: v.copy() for k, v in alive.items()}
        for names in [list(alive)] if whole else [[k] for k in alive]:
            measured = np.concatenate([norms[k][alive[k]] for k in names])
            c = count(measured)
            # One after the other, the smallest first, as long as floors permit.
            order = sorted(
                (norms[k][j], k, j) for k in names for j in range(len(alive[k]))
            )
            order = [(k, j) for _, k, j in order if alive[k][j]]
            held = {k: sorted(norms[k][alive[k]])[-floor] for k in names}
            free = [(k, j) for k, j in order if norms[k][j] < held[k]]
            for k, j in free[:c]:
                new[k][j] = False
        out.append((mask, trained, dict(alive), norms))
        alive = new
    return out


@pytest.mark.parametrize("scope", ["global", "dimension"])
def test_channels(x64, scope):
    params = toy.mlp_params(dtype=jnp.float64)
    groups = toy.mlp_groups(params)
    # Strong enough that floors bind at the end.
    exponents, numbers = dict(p=1.0, q=2.0), dict(eta=0.5, gamma=1.0, beta=0.9)
    expected = channels_by_hand(
        params, 4, lambda w: budget(w, **exponents, **numbers), scope == "global", 2
    )
    done = list(
        methods.pruning_rounds(
            Trainer(),
            params,
            methods.sap(**numbers),
            rounds=4,
            groups=groups,
            scope=scope,
            min_channels=2,
            **exponents,
        )
    )
    for found, (mask, trained, alive, norms) in zip(done, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found.mask, mask)
        jax.tree.map(np.testing.assert_array_equal, found.params, trained)
        left = groups.split(sdp_jax.channels_alive(groups, found.params))
        for k in alive:
            np.testing.assert_array_equal(left[k], alive[k])
        np.testing.assert_allclose(
            found.kept, sum(v.sum() for v in alive.values()) / 11
        )
        if scope == "global":
            joined = np.concatenate([norms[k][alive[k]] for k in alive])
            np.testing.assert_allclose(found.index, index(joined, 1, 2), atol=1e-12)
        else:
            value = index(norms["hidden1"][alive["hidden1"]], 1, 2)
            np.testing.assert_allclose(found.index["hidden1"], value, atol=1e-12)
    assert [int(v.sum()) for v in expected[-1][2].values()] == [2, 2]
    assert done[1].kept < 1


def test_a_run_goes_on():
    params = toy.mlp_params()
    run = methods.pruning_rounds
    whole = list(run(Trainer(), params, methods.one_shot(), rounds=3))
    rule = methods.one_shot(dense=whole[0].params)
    later = run(
        Trainer(2), params, rule, rounds=3, begin_round=2, mask=whole[1].next_mask
    )
    for a, b in zip(whole[2:], later, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    options = dict(rule=methods.sap(), rounds=3, rewind=False)
    warm = list(run(Trainer(), params, **options))
    later = run(
        Trainer(2), warm[1].params, begin_round=2, mask=warm[1].next_mask, **options
    )
    for a, b in zip(warm[2:], later, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_may_go_is_told():
    params = toy.mlp_params()
    rounds = methods.pruning_rounds(
        Trainer(),
        params,
        methods.lottery_ticket(0.5),
        rounds=2,
        prunable=lambda path, leaf: path.startswith("layer1"),
    )
    last = list(rounds)[-1]
    assert all(m.all() for m in jax.tree.leaves(last.mask["layer0"]))
    assert sum(m.sum() for m in last.mask["layer1"].values()) == 9  # of 35, 18
    assert last.kept == 9 / 35
    # A row that has nothing left stays as it is.
    mask = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    mask["layer1"]["kernel"][:, 3] = False
    rounds = methods.pruning_rounds(
        Trainer(), params, methods.sap(), rounds=1, scope="row", mask=mask
    )
    for done in rounds:
        assert not done.mask["layer1"]["kernel"][:, 3].any()
        assert done.index["layer1/kernel"][3] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keep_mask_serves_all_rounds_by_one_compilation(dtype):
    params = toy.mlp_params(dtype=dtype)
    x, y = toy.batch(dtype=dtype)

    def optimizer(mask):
        return optax.chain(
            optax.add_decayed_weights(0.1),
            optax.sgd(0.1, 0.9),
            methods.keep_mask(mask),
        )

    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9))
    update = optimizer(None).update

    @jax.jit
    def step(params, state):
        updates, state = update(jax.grad(toy.loss)(params, (x, y)), state, params)
        return optax.apply_updates(params, updates), state, updates

    def train(params, mask):
        state = optimizer(mask).init(params)
        for _ in range(3):
            params, state, updates = step(params, state)
        jax.tree.map(lambda u, p: u.dtype == p.dtype or pytest.fail(), updates, params)
        return params

    done = list(methods.pruning_rounds(train, params, methods.sap(gamma=2.0), rounds=2))
    assert step._cache_size() == 1 and done[-1].kept < 0.8
    for found in done:
        zeros = jax.tree.map(lambda p, m: np.all(np.asarray(p)[~m] == 0), *found[1:3])
        assert all(jax.tree.leaves(zeros))
        same = jax.tree.map(lambda p, q: p.dtype == q.dtype, found.params, params)
        assert all(jax.tree.leaves(same))
    # Nothing masked: the base optimizer.
    now, state = params, base.init(params)
    for _ in range(3):
        updates, state = base.update(jax.grad(toy.loss)(now, (x, y)), state, now)
        now = optax.apply_updates(now, updates)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
        ),
        now,
        done[0].params,
    )
    # What was not zero becomes so; not-a-number does not pass a mask.
    tx = methods.keep_mask(jnp.array([True, False]))
    ours = jnp.array([1.0, 3.0])
    updates, _ = tx.update(jnp.array([1.0, jnp.nan]), tx.init(ours), ours)
    np.testing.assert_array_equal(optax.apply_updates(ours, updates), [2.0, 0.0])
    jax.eval_shape(tx.init, ours)
    tx.init({})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": -1}, ValueError, "rounds must be"),
        ({"rounds": 1.5}, TypeError, "rounds must be an integer"),
        ({"begin_round": 3}, ValueError, "begin_round"),
        ({"p": 1.0, "q": 0.5}, ValueError, "0 < p < q"),
        ({"rule": min}, TypeError, "rule must be a PruningRule"),
        ({"scope": "dimension"}, ValueError, "without groups"),
        ({"groups": toy.mlp_groups(), "scope": "row"}, ValueError, "with groups"),
        ({"groups": toy.mlp_groups(), "min_channels": 9}, ValueError, "min_channels"),
        ({"groups": toy.mlp_groups(), "prunable": id}, ValueError, "single weights"),
        ({"prunable": lambda path, leaf: False}, ValueError, "no leaf is prunable"),
        ({"mask": {}}, ValueError, "mask must be"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        given = {"rule": methods.sap(), "rounds": 2} | options
        methods.pruning_rounds(Trainer(), toy.mlp_params(), **given)


def test_more_bad_input():
    params = toy.mlp_params()
    run, sap = methods.pruning_rounds, methods.sap()
    with pytest.raises(TypeError, match="train must be"):
        run(None, params, sap, rounds=1)
    for rule in (methods.lottery_ticket, methods.one_shot):
        with pytest.raises(ValueError, match="sparsity"):
            rule(1.0)
    for options in ({"eta": -0.1}, {"gamma": -0.1}, {"beta": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.sap(**options)
    with pytest.raises(ValueError, match="dense="):
        run(Trainer(), params, methods.one_shot(), rounds=2, begin_round=1)
    rounds = run(
        lambda p, m: jax.tree.map(lambda x: x + 1, p),
        params,
        methods.sap(gamma=3.0),
        rounds=1,
    )
    next(rounds)
    with pytest.raises(ValueError, match=r"layer0/kernel.*keep_mask"):
        next(rounds)
    with pytest.raises(ValueError, match="structure and shapes"):
        next(run(lambda p, m: {}, params, sap, rounds=1))
    with pytest.raises(ValueError, match="mask must be"):
        methods.keep_mask({}).init(params)
    with pytest.raises(ValueError, match="keep_mask needs"):
        tx = methods.keep_mask(jnp.ones(2, bool))
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_weights_that_are_zero_already_do_not_hold_up_the_rounds():
    params = {"w": jnp.arange(1.0, 41.0).reshape(5, 8).at[:, :2].set(0)}
    rule = methods.lottery_ticket(0.2)
    rounds = methods.pruning_rounds(lambda p, mask: p, params, rule, rounds=2)
    kept = [r.kept for r in rounds]
    # The ten zeros first, then a fifth of what is left.
    assert kept == pytest.approx([1.0, 0.75, 0.6])


def test_training_that_fails_is_said():
    params = {"w": jnp.ones((2, 3))}
    rounds = methods.pruning_rounds(
        lambda p, m: {"w": p["w"] * jnp.nan}, params, methods.sap(), rounds=1
    )
    with pytest.raises(ValueError, match=r"train returned NaN in leaf 'w'"):
        list(rounds)
