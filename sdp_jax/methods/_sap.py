"""Iterative pruning: train, remove, rewind, train again.

The published loops differ in how much goes in a round and in which weights are ranked:
:func:`sap`, :func:`lottery_ticket` and :func:`one_shot` tell that, and
:func:`pruning_rounds` is the loop.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import check_inexact, check_kind, check_params, transformation
from sdp_jax.channels import Weighting, channel_norms, channel_weights, channels_alive
from sdp_jax.checks import check_number
from sdp_jax.entries import keep_channels
from sdp_jax.groups import Groups
from sdp_jax.methods.pqi import check_alike, check_scope, pq_index, prune_count
from sdp_jax.tree import PyTree, leaf_table, replace_leaves

# ``train(params, mask) -> params``
Train: TypeAlias = Callable[[PyTree, PyTree], PyTree]
# ``prunable(path, leaf) -> whether entries of this leaf may go``
Prunable: TypeAlias = Callable[[str, Any], bool]
RoundScope = Literal["global", "tensor", "row", "dimension"]
# Values of what may go and which of them are left, one row for each budget.
Block: TypeAlias = tuple[np.ndarray, np.ndarray]


class PruningRule(NamedTuple):
    """What goes in a round of :func:`pruning_rounds`.

    Attributes:
      count: ``count(index, d, p, q)``, how many of the ``d`` entries go that are left
        with this PQ Index; arrays of both.
      ranked_by: the weights whose smallest go: ``None`` for those that the round has
        trained, ``"first"`` for those of the first round, or a tree of weights.
    """

    count: Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
    ranked_by: Any = None


class PruningRound(NamedTuple):
    """One round of iterative pruning.

    Attributes:
      round: its number; 0 trains the dense model.
      params: the trained parameters.
      mask: which entries they had, a tree of Boolean NumPy arrays.
      index: PQ Index of the entries (or channel norms) that may go and are left: a
        number for scope ``"global"``, otherwise an array for each leaf or dimension.
      kept: the share of the prunable entries (or channels) that are left.
      next_mask: the entries of the next round, ``None`` after the last.
    """

    round: int
    params: PyTree
    mask: PyTree
    index: Any
    kept: float
    next_mask: PyTree | None


class KeepMaskState(NamedTuple):
    """State of :func:`keep_mask`.

    Attributes:
      mask: Boolean arrays, shaped like the parameters.
    """

    mask: PyTree


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Sets the entries to zero where the mask is False.

    Args:
      params: the parameters.
      mask: a tree of the same structure, Boolean arrays.

    Returns:
      A tree of the same structure and dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> print(methods.apply_mask(jnp.array([1., 2.]), jnp.array([True, False])))
      [1. 0.]
    """
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)


def keep_mask(mask: PyTree) -> optax.GradientTransformationExtraArgs:
    """Keeps entries at zero while the others train; the last piece of a chain.

    The mask is part of the state: a step that is compiled once serves all rounds, and
    what momentum or weight decay would do to a masked entry has no effect.

    Args:
      mask: a tree of Boolean arrays, shaped like the parameters.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: in ``init``, if mask and parameters differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sdp_jax import methods
      >>> tx = optax.chain(
      ...     optax.sgd(0.5), methods.keep_mask(jnp.array([True, False])))
      >>> params = jnp.array([1., 2.])
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.5 0. ]
    """

    def init(params: optax.Params) -> KeepMaskState:
        if not jax.tree.leaves(params):
            return KeepMaskState(params)
        _check_mask(params, mask)
        return KeepMaskState(jax.tree.map(lambda m: jnp.array(m, bool), mask))

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        kept = jax.tree.map(
            lambda u, p, m: jnp.where(m, u.astype(p.dtype), -p),
            updates,
            params,
            state.mask,
        )
        return kept, state

    return transformation("keep_mask", init, update)


def sap(eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9) -> PruningRule:
    """Sparsity-informed adaptive pruning: the PQ Index tells how much goes.

    Of the ``d`` entries that are left with a PQ Index ``I``, ``c`` go::

        r = ⌈d (1 + η)^(−q / (q − p)) (1 − I)^(q p / (q − p))⌉
        c = ⌊d · clip(γ (1 − r / d), 0, β)⌋

    Args:
      eta: ``η``; larger removes more.
      gamma: ``γ``; larger removes more.
      beta: ``β``, the largest share that one round removes.

    Returns:
      A rule for :func:`pruning_rounds`.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument is of another kind.

    References:
      Diao, Wang, Zhang, Yang, Ding, Tarokh, "Pruning Deep Neural Networks from a
      Sparsity Perspective", ICLR 2023, arXiv 2302.05601, Algorithm 1.

    Example:
      >>> import numpy as np
      >>> from sdp_jax import methods
      >>> rule = methods.sap(beta=0.2)
      >>> print(rule.count(np.array([0.153]), np.array([1000]), 0.5, 1))
      [153]
    """
    count = functools.partial(prune_count, eta=eta, gamma=gamma, beta=beta)
    count(0.0, 1)  # Checks the numbers.
    return PruningRule(count)


def lottery_ticket(sparsity: float = 0.2) -> PruningRule:
    """The same share of what is left goes in each round, ``⌊sparsity · d⌋`` of ``d``.

    Args:
      sparsity: the share.

    Returns:
      A rule for :func:`pruning_rounds`.

    Raises:
      ValueError: if ``sparsity`` is outside [0, 1).
      TypeError: if it is not a number.

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635;
      in this form the baseline of Diao et al., arXiv 2302.05601.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [3., 0.1]])}
      >>> rule = methods.lottery_ticket(0.5)
      >>> rounds = methods.pruning_rounds(lambda w, mask: w, params, rule, rounds=2)
      >>> [done.kept for done in rounds]
      [1.0, 0.5, 0.25]
    """
    high = np.nextafter(1, 0)
    check_number("sparsity", sparsity, low=0, high=high, rule="a number in [0, 1)")
    return PruningRule(lambda index, d, p, q: np.floor(sparsity * d).astype(np.int64))


def one_shot(sparsity: float = 0.2, dense: PyTree | None = None) -> PruningRule:
    """The same with one ranking: that of the first, dense, trained weights.

    Args:
      sparsity: see :func:`lottery_ticket`.
      dense: the weights to rank by; by default the result of the first training. A run
        that goes on after an interruption needs them.

    Returns:
      A rule for :func:`pruning_rounds`.

    Raises:
      ValueError: if ``sparsity`` is outside [0, 1).
      TypeError: if it is not a number.

    References:
      Baseline of Diao et al., arXiv 2302.05601.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [3., 0.1]])}
      >>> rule = methods.one_shot(0.5)
      >>> rounds = methods.pruning_rounds(lambda w, mask: w, params, rule, rounds=1)
      >>> print([*rounds][-1].mask["w"])
      [[ True False]
       [ True False]]
    """
    return PruningRule(
        lottery_ticket(sparsity).count, "first" if dense is None else dense
    )


def pruning_rounds(
    train: Train,
    params: PyTree,
    rule: PruningRule,
    *,
    rounds: int,
    p: float = 0.5,
    q: float = 1.0,
    scope: RoundScope = "global",
    groups: Groups | None = None,
    rewind: bool = True,
    prunable: Prunable | None = None,
    axis: int = -1,
    weights: Weighting | Mapping[str, float] = "plain",
    min_channels: int | Mapping[str, int] = 1,
    begin_round: int = 0,
    mask: PyTree | None = None,
) -> Iterator[PruningRound]:
    """Iterative pruning: in each round the smallest weights go, and the rest trains.

    In each round ``train`` gets the initial parameters under the mask; of the weights
    that are left it then removes those of smallest magnitude, as many as the rule
    tells: all whose magnitude is below the ``(c + 1)``-th smallest. There are ``rounds
    + 1`` trainings and nothing is removed after the last.

    With ``groups`` the same is done with the norms of channels, and all producers of a
    channel go at once (our own extension: the papers remove weights). Index and ``c``
    are those of all living channels; of each dimension the ``min_channels`` largest
    stay.

    Args:
      train: ``train(params, mask) -> params``, trains anew and leaves masked entries at
        zero, for example by :func:`keep_mask`. The mask holds NumPy arrays.
      params: the initial parameters.
      rule: how many go, and which weights are ranked: :func:`sap`,
        :func:`lottery_ticket`, :func:`one_shot`, or a :class:`PruningRule` of one's
        own.
      rounds: number of removals ``T``.
      p: the smaller exponent of the PQ Index that rule and rounds get.
      q: the larger one.
      scope: what index and removal are taken over: ``"global"``; ``"tensor"``, each
        leaf (the paper's layer); ``"row"``, each output of a leaf (its neuron); with
        groups ``"global"`` or ``"dimension"``.
      groups: the channel dimensions, to remove whole channels.
      rewind: each training starts from ``params``; otherwise from the last result.
      prunable: ``prunable(path, leaf)`` tells whether entries of a leaf may go; by
        default those of leaves with two axes or more. Not with groups.
      axis: the output axis for ``"row"``; the last in kernels of Flax.
      weights: with groups, the weighting of the norms, see
        :func:`sdp_jax.channel_weights`.
      min_channels: with groups, channels that stay in each dimension; a number, or one
        for each name.
      begin_round: number of the first round, to go on with an interrupted run; with
        ``rewind=False``, ``params`` are then its last result.
      mask: mask of the first round: the ``next_mask`` of the round before it. ``None``
        for no mask.

    Returns:
      An iterator over the rounds, see :class:`PruningRound`. A round is trained when it
      is asked for. Removal is done on the host.

    Raises:
      ValueError: if an argument is out of range or does not go with the others, or,
        while iterating, if ``train`` changes the tree or moves a masked entry.
      TypeError: if an argument is of another kind.

    References:
      Diao, Wang, Zhang, Yang, Ding, Tarokh, "Pruning Deep Neural Networks from a
      Sparsity Perspective", ICLR 2023, arXiv 2302.05601, Algorithm 1; rounding and
      comparison are those of its code. The paper keeps the checkpoint of best test
      metric in each round; here that is up to ``train``.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [3., 0.1]]), "b": jnp.zeros(2)}
      >>> train = lambda params, mask: params  # Nothing to learn.
      >>> rule = methods.sap()
      >>> for done in methods.pruning_rounds(train, params, rule, rounds=1, p=1., q=2.):
      ...     print(done.round, done.kept, round(done.index, 3))
      0 1.0 0.206
      1 0.75 0.094
    """
    if not callable(train):
        raise TypeError(f"train must be train(params, mask) -> params; got {train!r}")
    if not isinstance(rule, PruningRule):
        raise TypeError(
            f"rule must be a PruningRule, for example methods.sap(); got {rule!r}"
        )
    for name, value in (("rounds", rounds), ("begin_round", begin_round)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    if not 0 <= begin_round <= rounds:
        raise ValueError(
            "rounds must be at least 0 and begin_round between 0 and rounds; got "
            f"begin_round={begin_round}, rounds={rounds}"
        )
    if isinstance(rule.ranked_by, str) and begin_round > 0:
        raise ValueError(
            "one_shot ranks by the first trained weights: give them as dense= to go on "
            f"at round {begin_round}"
        )
    check_inexact(params)
    pq_index((), p, q)
    check_scope(scope, groups, ("global", "dimension"))
    if groups is None:
        units = _Weights(params, p, q, scope, prunable, axis)
    elif prunable is not None:
        raise ValueError("prunable is for single weights; groups tell what may go")
    else:
        units = _Channels(params, p, q, scope, groups, weights, min_channels)
    if mask is None:
        mask = jax.tree.map(lambda x: np.ones(np.shape(x), bool), params)
    else:
        _check_mask(params, mask)
    first = jax.tree.map(lambda m: np.asarray(m, bool), mask)

    def lowest_out(values: np.ndarray, alive: np.ndarray, index: Any) -> np.ndarray:
        """Which entries of a matrix stay, where each row loses its smallest ones."""
        if not values.size:
            return alive
        number = alive.sum(axis=1)
        index = np.broadcast_to(np.asarray(index, np.float64), number.shape)
        ascending = np.sort(np.where(alive, values, np.inf), axis=1)
        place = np.minimum(rule.count(index, number, p, q), values.shape[1] - 1)
        threshold = np.take_along_axis(ascending, place[:, None], axis=1)
        # Entries that are zero already go as well, or they would hold up every round.
        dead = (threshold == 0) & (values == 0)
        return alive & ~((values < threshold) | dead)

    def run() -> Iterator[PruningRound]:
        mask, start, ranked_by = first, params, rule.ranked_by
        for number in range(begin_round, rounds + 1):
            trained = train(apply_mask(start, mask), mask)
            _check_trained(params, trained, mask)
            if isinstance(ranked_by, str):
                ranked_by = trained
            index = jax.device_get(units.index(trained, mask))
            blocks = units.blocks(trained if ranked_by is None else ranked_by, mask)
            living = [alive for _, alive in blocks.values()]
            kept = sum(int(a.sum()) for a in living) / sum(a.size for a in living)
            following = None
            if number < rounds:
                left = {k: lowest_out(*b, index[k]) for k, b in blocks.items()}
                following = units.put(mask, left)
            seen = float(index[""]) if scope == "global" else dict(index)
            yield PruningRound(number, trained, mask, seen, kept, following)
            mask = following
            start = start if rewind else trained

    return run()


class _Weights:
    """Single weights that may go, in blocks with an index and a budget for each row."""

    def __init__(
        self, params: PyTree, p: float, q: float, scope: Any, prunable: Any, axis: int
    ):
        table = leaf_table(params)
        chosen = prunable or (lambda path, leaf: np.ndim(leaf) > 1)
        self.shapes = {k: np.shape(x) for k, x in table.items() if chosen(k, x)}
        if not self.shapes:
            raise ValueError(
                "no leaf is prunable; by default those with two axes or more are"
            )
        self.scope, self.axis = scope, axis

        @jax.jit
        def index(tree: PyTree, mask: PyTree) -> dict[str, jax.Array]:
            part, alive = self.pick(tree), self.pick(mask)
            found: Any = pq_index(part, p, q, scope=scope, mask=alive, axis=axis)
            return {"": found} if scope == "global" else found

        self.index = index

    def pick(self, tree: PyTree) -> dict[str, Any]:
        """The leaves that may go."""
        table = leaf_table(tree)
        return {path: table[path] for path in self.shapes}

    def blocks(self, tree: PyTree, mask: PyTree) -> dict[str, Block]:
        """The weights and which are alive, as matrices with one row for each budget."""
        values = {k: self.matrix(_magnitude(x)) for k, x in self.pick(tree).items()}
        alive = {k: self.matrix(np.asarray(x)) for k, x in self.pick(mask).items()}
        if self.scope != "global":
            return {k: (values[k], alive[k]) for k in values}
        joined = [np.concatenate([*x.values()], axis=1) for x in (values, alive)]
        return {"": (joined[0], joined[1])}

    def matrix(self, leaf: np.ndarray) -> np.ndarray:
        """A leaf as one row, or as one for each output."""
        if self.scope != "row" or not leaf.ndim:
            return leaf.reshape(1, -1)
        rows = np.moveaxis(leaf, self.axis, 0)
        return rows.reshape(len(rows), -1)

    def put(self, mask: PyTree, left: dict[str, np.ndarray]) -> PyTree:
        """The mask with these entries."""
        if self.scope == "global":
            ends = np.cumsum([int(np.prod(s)) for s in self.shapes.values()])[:-1]
            left = dict(zip(self.shapes, np.split(left[""][0], ends), strict=True))
        out = {}
        for path, shape in self.shapes.items():
            if self.scope == "row" and shape:
                moved = np.moveaxis(np.empty(shape, bool), self.axis, 0).shape
                out[path] = np.moveaxis(left[path].reshape(moved), 0, self.axis)
            else:
                out[path] = left[path].reshape(shape)
        return replace_leaves(mask, out)


class _Channels:
    """Whole channels that may go, by their norms."""

    def __init__(
        self,
        params: PyTree,
        p: float,
        q: float,
        scope: str,
        groups: Groups,
        weights: Any,
        min_channels: Any,
    ):
        check_kind(groups)
        check_params(groups, params)
        channel_weights(groups, weights)
        self.floors = prox.resolve_floors(groups, min_channels)
        self.groups, self.scope, self.pqs = groups, scope, (p, q)
        self.norms = jax.jit(lambda tree: channel_norms(groups, tree, weights=weights))

    def index(self, tree: PyTree, mask: PyTree) -> dict[str, jax.Array]:
        """The index of each block."""
        norms = self.groups.split(self.norms(tree))
        alive = self.groups.split(channels_alive(self.groups, mask))
        if self.scope == "global":
            return {"": pq_index(norms, *self.pqs, mask=alive)}
        return pq_index(norms, *self.pqs, mask=alive, scope="tensor")

    def blocks(self, tree: PyTree, mask: PyTree) -> dict[str, Block]:
        """The norms and which channels are alive; those that have to stay come last."""
        norms, alive = self.norms(tree), channels_alive(self.groups, mask)
        ranked = jnp.where(alive, norms, -jnp.inf)
        held = prox.largest_each(self.groups, ranked, prox.floor_counts(self.floors))
        values, living = np.where(held, np.inf, norms), np.asarray(alive)
        if self.scope == "global":
            return {"": (values[None], living[None])}
        parts = self.groups.split(values), self.groups.split(living)
        return {k: (parts[0][k][None], parts[1][k][None]) for k in self.groups.sizes}

    def put(self, mask: PyTree, left: dict[str, np.ndarray]) -> PyTree:
        """The mask of these channels."""
        keep = np.concatenate(list(left.values()), axis=1)[0]
        return jax.tree.map(np.asarray, keep_channels(self.groups, mask, keep))


def _magnitude(leaf: Any) -> np.ndarray:
    value = np.asarray(leaf)
    if not np.iscomplexobj(value) and value.dtype.itemsize < 4:
        value = value.astype(np.float32)
    return np.abs(value)


def _check_mask(params: PyTree, mask: PyTree) -> None:
    rule = "mask must be a tree of Boolean arrays with the structure and the shapes of"
    check_alike(f"{rule} the parameters", params, mask)


def _check_trained(params: PyTree, trained: PyTree, mask: PyTree) -> None:
    rule = "train must return parameters of the structure and shapes that it got"
    check_alike(rule, params, trained)
    masks = leaf_table(mask)
    for path, leaf in leaf_table(trained).items():
        if np.any(np.isnan(_magnitude(leaf))):
            raise ValueError(
                f"train returned NaN in leaf {path!r}; lower its learning rate"
            )
        if np.any(np.asarray(leaf)[~masks[path]] != 0):
            raise ValueError(
                f"train moved masked entries of leaf {path!r} away from zero; put "
                "sdp_jax.methods.keep_mask(mask) behind the optimizer"
            )
