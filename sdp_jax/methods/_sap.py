"""Sparsity-informed adaptive pruning, and the loop of iterative pruning.

Train, remove, rewind, train again: the loops differ in how much goes in a round and in
which weights are ranked, and are written once.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import check_inexact, check_kind, check_params, need_params
from sdp_jax.channels import (
    Weighting,
    channel_norms,
    channel_weights,
    channels_alive,
    scale_channels,
)
from sdp_jax.checks import check_number
from sdp_jax.groups import Groups
from sdp_jax.methods.pqi import pq_index, prune_count
from sdp_jax.tree import PyTree, leaf_table

# ``train(params, mask) -> params``
Train: TypeAlias = Callable[[PyTree, PyTree], PyTree]
# ``prunable(path, leaf) -> whether entries of this leaf may go``
Prunable: TypeAlias = Callable[[str, Any], bool]
# How many of the living entries go: ``count(index, number)``.
Count: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
SapScope = Literal["global", "tensor", "row", "dimension"]


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

    def init_fn(params: optax.Params) -> KeepMaskState:
        if not jax.tree.leaves(params):
            return KeepMaskState(params)
        _check_mask(params, mask)
        return KeepMaskState(jax.tree.map(lambda m: jnp.array(m, bool), mask))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepMaskState]:
        del extra_args
        params = need_params(params, updates, "keep_mask")
        kept = jax.tree.map(
            lambda u, p, m: jnp.where(m, u.astype(p.dtype), -p),
            updates,
            params,
            state.mask,
        )
        return kept, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sap(
    train: Train,
    params: PyTree,
    *,
    rounds: int,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: SapScope = "global",
    groups: Groups | None = None,
    rewind: bool = True,
    prunable: Prunable | None = None,
    axis: int = -1,
    weights: Weighting = "plain",
    min_channels: int = 1,
    begin: int = 0,
    mask: PyTree | None = None,
) -> Iterator[PruningRound]:
    """Sparsity-informed adaptive pruning: the PQ Index tells how much goes.

    In each round ``train`` gets the initial parameters under the mask; of the ``d``
    weights that are left with a PQ Index ``I`` it then removes those of smallest
    magnitude, ``c`` of them::

        r = ⌈d (1 + η)^(−q / (q − p)) (1 − I)^(q p / (q − p))⌉
        c = ⌊d · clip(γ (1 − r / d), 0, β)⌋

    that is, all whose magnitude is below the ``(c + 1)``-th smallest. There are
    ``rounds + 1`` trainings and nothing is removed after the last.

    With ``groups`` the same is done with the norms of channels, and all producers of a
    channel go at once (our own extension: the paper removes weights). Index and ``c``
    are those of all living channels; of each dimension the ``floor`` largest stay.

    Args:
      train: ``train(params, mask) -> params``, trains anew and leaves masked entries at
        zero, for example by :func:`keep_mask`. The mask holds NumPy arrays.
      params: the initial parameters.
      rounds: number of removals ``T``.
      p: the smaller exponent of the index.
      q: the larger one.
      eta: ``η``; larger removes more.
      gamma: ``γ``; larger removes more.
      beta: ``β``, the largest share that one round removes.
      scope: what index and removal are taken over: ``"global"``; ``"tensor"``, each
        leaf (the paper's layer); ``"row"``, each output of a leaf (its neuron); with
        groups ``"global"`` or ``"dimension"``.
      groups: the channel dimensions, to remove whole channels.
      rewind: each training starts from ``params``; otherwise from the last result.
      prunable: ``prunable(path, leaf)`` tells whether entries of a leaf may go; by
        default those of leaves with two axes or more. Not with groups.
      axis: the output axis for ``"row"``; the last in kernels of Flax.
      norm: with groups, weighting of the norms, see :func:`sdp_jax.channel_weights`.
      min_channels: with groups, channels that stay in each dimension.
      begin: number of the first round, to go on with an interrupted run; with
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
      >>> def train(params, mask):  # Nothing to learn.
      ...     return params
      >>> for done in methods.sap(train, params, rounds=1, p=1., q=2.):
      ...     print(done.round, done.kept, round(done.index, 3))
      0 1.0 0.206
      1 0.75 0.094
    """

    def count(index: np.ndarray, number: np.ndarray) -> np.ndarray:
        return prune_count(index, number, p, q, eta, gamma, beta)

    count(np.zeros(1), np.ones(1))  # Checks the numbers.
    units = _units(params, p, q, scope, groups, prunable, axis, norm, floor)
    return _rounds(train, params, rounds, units, count, rewind, begin, mask, None)


def lottery_ticket(
    train: Train,
    params: PyTree,
    *,
    rounds: int,
    share: float = 0.2,
    p: float = 0.5,
    q: float = 1.0,
    scope: SapScope = "global",
    groups: Groups | None = None,
    rewind: bool = True,
    prunable: Prunable | None = None,
    axis: int = -1,
    weights: Weighting = "plain",
    min_channels: int = 1,
    begin: int = 0,
    mask: PyTree | None = None,
) -> Iterator[PruningRound]:
    """The same loop with a fixed share: each round removes so much of what is left.

    Args:
      train: as for :func:`sap`.
      params: as for :func:`sap`.
      rounds: as for :func:`sap`.
      share: of the ``d`` entries that are left, ``⌊share · d⌋`` go in each round.
      p: exponent of the index, which is only reported.
      q: the larger exponent.
      scope: as for :func:`sap`.
      groups: as for :func:`sap`.
      rewind: as for :func:`sap`.
      prunable: as for :func:`sap`.
      axis: as for :func:`sap`.
      norm: as for :func:`sap`.
      min_channels: as for :func:`sap`.
      begin: as for :func:`sap`.
      mask: as for :func:`sap`.

    Returns:
      As :func:`sap`.

    Raises:
      ValueError: as :func:`sap`.
      TypeError: as :func:`sap`.

    References:
      Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635;
      in this form the baseline of Diao et al., arXiv 2302.05601.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [3., 0.1]])}
      >>> rounds = methods.lottery_ticket(
      ...     lambda params, mask: params, params, rounds=2, share=0.5)
      >>> [done.kept for done in rounds]
      [1.0, 0.5, 0.25]
    """
    count = _fixed(share)
    units = _units(params, p, q, scope, groups, prunable, axis, norm, floor)
    return _rounds(train, params, rounds, units, count, rewind, begin, mask, None)


def one_shot(
    train: Train,
    params: PyTree,
    *,
    rounds: int,
    share: float = 0.2,
    p: float = 0.5,
    q: float = 1.0,
    scope: SapScope = "global",
    groups: Groups | None = None,
    rewind: bool = True,
    prunable: Prunable | None = None,
    axis: int = -1,
    weights: Weighting = "plain",
    min_channels: int = 1,
    begin: int = 0,
    mask: PyTree | None = None,
    dense: PyTree | None = None,
) -> Iterator[PruningRound]:
    """The same loop with one ranking: that of the first, dense, trained weights.

    Args:
      train: as for :func:`sap`.
      params: as for :func:`sap`.
      rounds: as for :func:`sap`.
      share: as for :func:`lottery_ticket`.
      p: exponent of the index, which is only reported.
      q: the larger exponent.
      scope: as for :func:`sap`.
      groups: as for :func:`sap`.
      rewind: as for :func:`sap`.
      prunable: as for :func:`sap`.
      axis: as for :func:`sap`.
      norm: as for :func:`sap`.
      min_channels: as for :func:`sap`.
      begin: as for :func:`sap`.
      mask: as for :func:`sap`.
      dense: the weights to rank by; by default the result of the first training. A run
        that goes on after an interruption needs them.

    Returns:
      As :func:`sap`.

    Raises:
      ValueError: as :func:`sap`, and if ``begin`` is above 0 without ``dense``.
      TypeError: as :func:`sap`.

    References:
      Baseline of Diao et al., arXiv 2302.05601.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[4., 1.], [3., 0.1]])}
      >>> rounds = methods.one_shot(
      ...     lambda params, mask: params, params, rounds=1, share=0.5)
      >>> print([*rounds][-1].mask["w"])
      [[ True False]
       [ True False]]
    """
    count = _fixed(share)
    units = _units(params, p, q, scope, groups, prunable, axis, norm, floor)
    if dense is None and begin > 0:
        raise ValueError(
            "one_shot ranks by the first trained weights: give them as dense= to go on "
            f"at round {begin}"
        )
    by: Any = "first" if dense is None else dense
    return _rounds(train, params, rounds, units, count, rewind, begin, mask, by)


def _rounds(
    train: Train,
    params: PyTree,
    rounds: int,
    units: "_Weights | _Channels",
    count: Count,
    rewind: bool,
    begin: int,
    mask: PyTree | None,
    ranked_by: Any,
) -> Iterator[PruningRound]:
    """The loop; checks what it was given at once.

    ``ranked_by`` is ``None`` for the latest weights, ``"first"`` for those of the first
    training, or weights.
    """
    for name, value in (("rounds", rounds), ("begin", begin)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    if not 0 <= begin <= rounds:
        raise ValueError(
            f"rounds must be at least 0 and begin between 0 and rounds; got begin="
            f"{begin}, rounds={rounds}"
        )
    if not callable(train):
        raise TypeError(f"train must be train(params, mask) -> params; got {train!r}")
    if mask is None:
        mask = jax.tree.map(lambda x: np.ones(np.shape(x), bool), params)
    else:
        _check_mask(params, mask)
    first = jax.tree.map(lambda m: np.asarray(m, bool), mask)

    def run() -> Iterator[PruningRound]:
        mask, start, reference = first, params, ranked_by
        for number in range(begin, rounds + 1):
            trained = train(apply_mask(start, mask), mask)
            _check_trained(params, trained, mask)
            index = units.index(trained, mask)
            if isinstance(reference, str):
                reference = trained
            following = None
            if number < rounds:
                rank = trained if reference is None else reference
                following = units.remove(rank, mask, index, count)
            kept = units.left(mask) / units.total
            yield PruningRound(
                number, trained, mask, units.report(index), kept, following
            )
            if following is None:
                return
            mask = following
            if not rewind:
                start = trained

    return run()


class _Weights:
    """Single weights that may go, in blocks with an index and a budget for each row."""

    def __init__(
        self, params: PyTree, p: float, q: float, scope: Any, prunable: Any, axis: int
    ):
        table = leaf_table(params)
        chosen = prunable or (lambda path, leaf: np.ndim(leaf) > 1)
        self.paths = [path for path, leaf in table.items() if chosen(path, leaf)]
        if not self.paths:
            raise ValueError(
                "no leaf is prunable; by default those with two axes or more are"
            )
        self.total = sum(np.size(table[path]) for path in self.paths)
        self._pqs, self._scope, self._axis = (p, q), scope, axis
        self._structure = jax.tree.structure(params)
        self._index = jax.jit(self._measure)

    def _measure(self, tree: PyTree, mask: PyTree) -> dict[str, jax.Array]:
        part, alive = (_pick(t, self.paths) for t in (tree, mask))
        found: Any = pq_index(
            part, *self._pqs, scope=self._scope, mask=alive, axis=self._axis
        )
        return {"": found} if self._scope == "global" else found

    def left(self, mask: PyTree) -> int:
        """How many are alive."""
        return sum(int(m.sum()) for m in _pick(mask, self.paths).values())

    def index(self, tree: PyTree, mask: PyTree) -> dict[str, np.ndarray]:
        """The index of each block."""
        return jax.device_get(self._index(tree, mask))

    def report(self, index: dict[str, np.ndarray]) -> Any:
        """The index as the user gets it."""
        if self._scope != "global":
            return dict(index)
        return float(index[""])

    def remove(
        self,
        tree: PyTree,
        mask: PyTree,
        index: dict[str, np.ndarray],
        count: Count,
    ) -> PyTree:
        """The next mask."""
        leaves = {k: _magnitude(v) for k, v in _pick(tree, self.paths).items()}
        masks = _pick(mask, self.paths)
        if self._scope == "global":
            joined, living = (
                np.concatenate([np.ravel(part[k]) for k in self.paths])[None]
                for part in (leaves, masks)
            )
            left = _lowest_out(joined, living, index[""], count)[0]
            cuts = np.cumsum([np.size(leaves[k]) for k in self.paths])[:-1]
            parts = zip(self.paths, np.split(left, cuts), strict=True)
            out = {k: part.reshape(leaves[k].shape) for k, part in parts}
        else:
            out = {}
            for k, leaf in leaves.items():
                axis = self._axis if leaf.ndim else 0
                shape = np.moveaxis(np.atleast_1d(leaf), axis, 0).shape
                rows = shape[0] if self._scope == "row" else 1
                matrix, living = (
                    np.moveaxis(np.atleast_1d(x), axis, 0).reshape(rows, -1)
                    for x in (leaf, masks[k])
                )
                left = _lowest_out(matrix, living, index[k], count).reshape(shape)
                out[k] = np.moveaxis(left, 0, axis).reshape(leaf.shape)
        table = leaf_table(mask) | out
        return jax.tree.unflatten(self._structure, list(table.values()))


class _Channels:
    """Whole channels that may go, by their norms."""

    def __init__(
        self,
        params: PyTree,
        p: float,
        q: float,
        scope: str,
        groups: Groups,
        norm: Any,
        min_channels: int,
    ):
        check_kind(groups)
        check_params(groups, params)
        channel_weights(groups, norm)
        self.total = groups.num_channels
        self._floors = prox.resolve_floors(groups, floor)
        self._groups, self._scope, self._norm = groups, scope, norm
        self._pqs = (p, q)
        self._norms = jax.jit(lambda tree: channel_norms(groups, tree, weights=weights))

    def left(self, mask: PyTree) -> int:
        """How many are alive."""
        return sum(int(alive.sum()) for alive in self._alive(mask).values())

    def index(self, tree: PyTree, mask: PyTree) -> dict[str, np.ndarray]:
        """The index of each block."""
        whole = self._scope == "global"
        found: Any = pq_index(
            self._norms(tree),
            *self._pqs,
            mask=self._alive(mask),
            scope="global" if whole else "tensor",
        )
        return jax.device_get({"": found} if whole else found)

    def report(self, index: dict[str, np.ndarray]) -> Any:
        """The index as the user gets it."""
        if self._scope == "global":
            return float(index[""])
        return {name: float(index[name]) for name in self._groups.sizes}

    def remove(
        self,
        tree: PyTree,
        mask: PyTree,
        index: dict[str, np.ndarray],
        count: Count,
    ) -> PyTree:
        """The next mask."""
        norms = {k: np.asarray(v) for k, v in self._norms(tree).items()}
        living = self._alive(mask)
        # The floor's channels come last and never go.
        free = {k: self._protect(k, norms[k], living[k]) for k in living}
        names = list(living)
        blocks = [names] if self._scope == "global" else [[name] for name in names]
        left: dict[str, np.ndarray] = {}
        for block in blocks:
            values, lives = (
                np.concatenate([part[k] for k in block])[None]
                for part in (free, living)
            )
            key = "" if self._scope == "global" else block[0]
            stay = _lowest_out(values, lives, index[key], count)[0]
            cuts = np.cumsum([len(living[k]) for k in block])[:-1]
            left |= dict(zip(block, np.split(stay, cuts), strict=True))
        ones = jax.tree.map(lambda m: np.asarray(m, np.float32), mask)
        factors = {k: jnp.asarray(v, jnp.float32) for k, v in left.items()}
        scaled = scale_channels(self._groups, jax.tree.map(jnp.asarray, ones), factors)
        return jax.tree.map(lambda x: np.asarray(x) != 0, scaled)

    def _alive(self, mask: PyTree) -> dict[str, np.ndarray]:
        found = channels_alive(self._groups, mask)
        return {name: np.asarray(found[name]) for name in self._groups.sizes}

    def _protect(self, name: str, norms: np.ndarray, alive: np.ndarray) -> np.ndarray:
        order = np.argsort(np.where(alive, -norms, np.inf), kind="stable")
        out = norms.astype(np.float64)
        out[order[: int(self._floors[name])]] = np.inf
        return out


def _lowest_out(
    values: np.ndarray, alive: np.ndarray, index: Any, count: Count
) -> np.ndarray:
    """Which entries of a matrix stay, where each row loses its smallest ones."""
    number = alive.sum(axis=1)
    if not values.size:
        return alive
    removed = count(
        np.broadcast_to(np.asarray(index, np.float64), number.shape), number
    )
    ascending = np.sort(np.where(alive, values, np.inf), axis=1)
    place = np.minimum(removed, values.shape[1] - 1)
    threshold = np.take_along_axis(ascending, place[:, None], axis=1)
    # Entries that are zero already go as well, or they would hold up every round.
    dead = (threshold == 0) & (values == 0)
    return alive & ~((values < threshold) | dead)


def _fixed(share: float) -> Count:
    high = np.nextafter(1, 0)
    check_number("share", share, low=0, high=high, rule="a number in [0, 1)")

    def count(index: np.ndarray, number: np.ndarray) -> np.ndarray:
        del index
        return np.floor(share * number).astype(np.int64)

    return count


def _units(
    params: PyTree,
    p: float,
    q: float,
    scope: Any,
    groups: Groups | None,
    prunable: Prunable | None,
    axis: int,
    norm: Any,
    min_channels: int,
) -> _Weights | _Channels:
    check_inexact(params)
    pq_index((), p, q)
    alone, grouped = ("global", "tensor", "row"), ("global", "dimension")
    allowed = alone if groups is None else grouped
    if scope not in allowed:
        raise ValueError(
            f"scope must be one of {allowed} {'without' if groups is None else 'with'} "
            f"groups; got {scope!r}"
        )
    if groups is None:
        return _Weights(params, p, q, scope, prunable, axis)
    if prunable is not None:
        raise ValueError("prunable is for single weights; groups tell what may go")
    return _Channels(params, p, q, scope, groups, norm, floor)


def _pick(tree: PyTree, paths: list[str]) -> dict[str, Any]:
    table = leaf_table(tree)
    return {path: table[path] for path in paths}


def _magnitude(leaf: Any) -> np.ndarray:
    value = np.asarray(leaf)
    if not np.iscomplexobj(value) and value.dtype.itemsize < 4:
        value = value.astype(np.float32)
    return np.abs(value)


def _check_mask(params: PyTree, mask: PyTree) -> None:
    ours, theirs = (jax.tree.map(np.shape, tree) for tree in (params, mask))
    if jax.tree.structure(params) != jax.tree.structure(mask) or ours != theirs:
        raise ValueError(
            "mask must be a tree of Boolean arrays with the structure and the shapes "
            f"of the parameters, {ours}; got {theirs}"
        )


def _check_trained(params: PyTree, trained: PyTree, mask: PyTree) -> None:
    ours, theirs = (jax.tree.map(np.shape, tree) for tree in (params, trained))
    if jax.tree.structure(params) != jax.tree.structure(trained) or ours != theirs:
        raise ValueError(
            "train must return parameters of the structure and shapes that it got, "
            f"{ours}; got {theirs}"
        )
    masks = leaf_table(mask)
    for path, leaf in leaf_table(trained).items():
        if np.any(np.isnan(np.asarray(leaf, np.float32))):
            raise ValueError(
                f"train returned NaN in leaf {path!r}; lower its learning rate"
            )
        if np.any(np.asarray(leaf)[~masks[path]] != 0):
            raise ValueError(
                f"train moved masked entries of leaf {path!r} away from zero; put "
                "sdp_jax.methods.keep_mask(mask) behind the optimizer"
            )
