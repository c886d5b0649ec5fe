"""Steps of training and evaluation, jitted, on one device or several."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import data, models, pipeline


class State(NamedTuple):
    """What training changes.

    Attributes:
      params: the parameters.
      batch_stats: running statistics, ``{}`` if there are none.
      opt_state: state of the optimizer.
    """

    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Flax's view of the model."""
        return variables_of(self.params, self.batch_stats)


# State, training set, order of the epoch, first batch, number of the first step and
# count, to state and losses.
Advance = Callable[
    [State, data.Split, jax.Array, int, int, int], tuple[State, jax.Array]
]


def variables_of(params: Any, batch_stats: Any) -> dict[str, Any]:
    """Flax's view of a model."""
    stats = {"batch_stats": batch_stats} if batch_stats else {}
    return {"params": params, **stats}


def make_loss(
    model: models.Model,
) -> Callable[[Any, Any, data.Split], tuple[jax.Array, Any]]:
    """``params, batch_stats, batch -> mean loss, new batch_stats`` in training mode."""

    def loss_fn(
        params: Any, batch_stats: Any, batch: data.Split
    ) -> tuple[jax.Array, Any]:
        output, changed = model.apply(
            variables_of(params, batch_stats),
            batch.images,
            train=True,
            mutable=["batch_stats"],
        )
        logits: Any = output
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), changed.get("batch_stats", {})

    return loss_fn


def make_update(
    model: models.Model, tx: optax.GradientTransformation
) -> Callable[[State, data.Split], tuple[State, jax.Array]]:
    """One step, not jitted: ``state, batch -> state, mean loss of the batch``."""
    loss_fn = make_loss(model)

    def update(state: State, batch: data.Split) -> tuple[State, jax.Array]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), loss

    return update


def make_step(
    model: models.Model, tx: optax.GradientTransformation
) -> Callable[[State, data.Split], tuple[State, jax.Array]]:
    """One jitted step: ``state, batch -> state, mean loss of the batch``."""
    return jax.jit(make_update(model, tx), donate_argnums=0)


def make_advance(
    model: models.Model,
    tx: optax.GradientTransformation,
    *,
    augment: Literal["none", "crop_flip"] = "none",
    seed: int = 0,
    scan: bool = False,
    mesh: Mesh | None = None,
) -> Advance:
    """Some steps of an epoch on a training set that lies on the device.

    Args:
      model: the network.
      tx: the optimizer.
      augment: none or crop_flip.
      seed: seed of the augmentation.
      scan: whether the steps are one compiled scan, or each a call of its own.
      mesh: devices that share each batch along its axis ``"data"``; normalisations see
        the whole batch. ``None`` for one device.

    Returns:
      ``state, training set, order, first batch, number of the first step, count`` to
      the new state and the losses ``(count,)``.
    """
    jitted = make_jitted(model, tx, augment=augment, seed=seed, scan=scan, mesh=mesh)

    def advance(
        state: State,
        split: data.Split,
        order: jax.Array,
        first: int,
        number: int,
        count: int,
    ) -> tuple[State, jax.Array]:
        if scan:
            batches = np.arange(first, first + count, dtype=np.int32)
            return jitted(state, split, order, batches, np.int32(number))
        losses = []
        for i in range(count):
            where = np.int32(first + i), np.int32(number + i)
            state, loss = jitted(state, split, order, *where)
            losses.append(loss)
        return state, jnp.stack(losses)

    return advance


def make_jitted(
    model: models.Model,
    tx: optax.GradientTransformation,
    *,
    augment: Literal["none", "crop_flip"] = "none",
    seed: int = 0,
    scan: bool = False,
    mesh: Mesh | None = None,
) -> Any:
    """What :func:`make_advance` calls: ``state, split, order, batch, number``.

    ``batch`` is the number of a batch in the order, with ``scan`` an array of
    consecutive ones; ``number`` that of the (first) step in the run.
    """
    update = make_update(model, tx)

    def step(
        state: State, split: data.Split, order: jax.Array, i: jax.Array, number: Any
    ) -> tuple[State, jax.Array]:
        index = jax.lax.dynamic_index_in_dim(order, i, keepdims=False)
        if mesh is not None:
            shared = NamedSharding(mesh, P("data"))
            index = jax.lax.with_sharding_constraint(index, shared)
        batch = pipeline.make_batch(augment, seed, split, index, number)
        return update(state, batch)

    def steps(
        state: State, split: data.Split, order: jax.Array, batches: jax.Array, number
    ) -> tuple[State, jax.Array]:
        def body(state: State, i: jax.Array) -> tuple[State, jax.Array]:
            return step(state, split, order, i, number + (i - batches[0]))

        return jax.lax.scan(body, state, batches)

    options: Any = {"donate_argnums": 0}
    if mesh is not None:
        options["out_shardings"] = NamedSharding(mesh, P())
    return jax.jit(steps if scan else step, **options)


def make_mesh(count: int | None, batch_size: int) -> Mesh | None:
    """The devices of a run.

    Args:
      count: how many local devices; ``None`` for all, on the CPU for one.
      batch_size: examples in a batch.

    Returns:
      A mesh with one axis ``"data"``, or ``None`` for one device.

    Raises:
      ValueError: if there are not so many, or they cannot share a batch evenly.
    """
    local = jax.local_devices()
    if count is None:
        count = 1 if local[0].platform == "cpu" else len(local)
    if not 1 <= count <= len(local):
        raise ValueError(
            f"devices must be between 1 and the {len(local)} local ones; got {count}"
        )
    if batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the number of devices, {count}; got "
            f"{batch_size}. Choose another, or fewer devices with --devices"
        )
    return None if count == 1 else Mesh(np.asarray(local[:count]), ("data",))


def on_devices(tree: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays on all devices of a mesh, whole on each."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, NamedSharding(mesh, P()))


def make_evaluate(
    apply: Callable[..., Any],
) -> Callable[[dict[str, Any], data.Split], tuple[float, float]]:
    """``variables, split -> mean loss, accuracy`` of all labels, in inference mode."""

    @jax.jit
    def chunk(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits: Any = apply(variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

    def evaluate(variables: dict[str, Any], split: data.Split) -> tuple[float, float]:
        size, totals = 2000, np.zeros(2)
        for start in range(0, len(split.labels), size):
            part = (x[start : start + size] for x in split)
            totals += np.asarray([float(t) for t in chunk(variables, *part)])
        loss, correct = totals / split.labels.size
        return float(loss), float(correct)

    return evaluate
