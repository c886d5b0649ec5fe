"""The Decay Pruning Method: channels fade out, and may come back."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from sdp_jax.base import (
    add_step,
    as_base,
    check_kind,
    check_params,
    need_params,
    step_to,
)
from sdp_jax.channels import PerChannel, channel_norms, channels_alive
from sdp_jax.checks import check_number, check_whole
from sdp_jax.entries import entry_sums, living
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.mesh import sharded_like
from sdp_jax.segments import sum_over
from sdp_jax.tree import PyTree, leaf_table, replace_leaves


class DecayPruningState(NamedTuple):
    """State of :func:`decay_pruning`.

    Attributes:
      base: state of the base optimizer.
      host: state of the host.
      count: number of updates so far, int32 scalar.
      steps: how many steps each channel has been decaying, 0 for those that are not.
      start: the norm at which its decay began.
      releases: how many channels have been released so far, int32 scalar.
    """

    base: Any
    host: Any
    count: jax.Array
    steps: PerChannel
    start: PerChannel
    releases: jax.Array


def decay_pruning(
    base: optax.ScalarOrSchedule | optax.GradientTransformation,
    host: optax.GradientTransformation,
    groups: Groups,
    *,
    steps: int = 5,
    rate: chex.Numeric | None = None,
    length: chex.Numeric = 1.0,
    release_end_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets the channels that ``host`` would zero at once fade out over some steps.

    **Smooth pruning.** When the host sets a channel of norm ``L`` to zero, it goes on
    taking the steps of ``base`` instead, ``x̃ = x + step``, but its norm is imposed::

        x ← x̃ · (L − n L / N) / ‖x̃‖        in the n-th step of its decay

    so that it is exactly zero after ``N = steps`` of them. With ``steps=1`` this is the
    host itself, ``hosted(base, host)``.

    **Self-rectifying.** From its second step on a decaying channel is released, that
    is, it takes the step of ``base`` and is an ordinary channel again, if both ::

        (‖x̃‖ − ‖x‖) / (L / N)  >  rate        the gradient drives its norm up
        ‖g‖ / mean of ‖g‖ over its dimension  >  length

    The paper names these two criteria and their thresholds; their exact form is not
    published with its code, and this one (normalisers, "and", the mean over the living
    channels of the dimension, the second step) is our choice.

    Any transformation that sets channels to zero can be the host:
    :func:`sdp_jax.methods.remove_lowest`, :func:`sdp_jax.methods.dhspg`,
    :func:`sdp_jax.methods.gate_decorator`, :func:`sdp_jax.group_soft_threshold`. It is
    told which channels were released (``released=``), and may choose them again later.

    Args:
      base: the optimizer that trains; a learning rate or a schedule stands for plain
        SGD.
      host: what prunes, behind the base.
      groups: the channel dimensions.
      steps: ``N``, the number of steps of a decay.
      rate: threshold ``T_rate``, in units of the decay of one step; ``None`` releases
        no channel (smooth pruning alone).
      length: threshold ``T_len``, in units of the mean gradient norm.
      release_end_step: last update at which a channel may be released, so that the
        host's target is met at the end; ``None`` for no such end.

    Returns:
      An Optax transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range, or the parameters do not fit.
      TypeError: if an argument is of another kind.

    References:
      Yang, Gao, Li, Li, Dong, Cui, "Decay Pruning Method: Smooth Pruning With a
      Self-Rectifying Procedure", arXiv 2406.03879.

    Example:
      >>> import jax.numpy as jnp, optax, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"w": jnp.array([[3., 0.6], [4., 0.8]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> host = methods.remove_lowest(
      ...     groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.l2_norm())
      >>> tx = methods.decay_pruning(0.1, host, groups, steps=2)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"][1].round(1))
      [4.  0.4]
      [4. 0.]
    """
    check_kind(groups)
    check_whole("steps", steps, low=1)
    if rate is not None:
        check_number("rate", rate, low=-1e30, rule="a number or None")
    check_number("length", length, low=0, rule="a non-negative number")
    if release_end_step is not None:
        check_whole("release_end_step", release_end_step)
    first = optax.with_extra_args_support(as_base(base))
    second = optax.with_extra_args_support(host)

    def init_fn(params: optax.Params) -> DecayPruningState:
        check_params(groups, params)
        size = (groups.num_channels,)
        return DecayPruningState(
            first.init(params),
            second.init(params),
            jnp.zeros((), jnp.int32),
            PerChannel(jnp.zeros(size, jnp.int32)),
            PerChannel(jnp.zeros(size, jnp.result_type(float))),
            jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayPruningState]:
        params = need_params(params, updates, "decay_pruning")
        count = jnp.asarray(optax.safe_increment(state.count))
        before = state.steps.per_channel
        alive = channels_alive(groups, params)

        def norms_of(tree: PyTree) -> jax.Array:
            return channel_norms(groups, living(groups, tree, alive))

        norms = norms_of(params)

        moved, base_state = first.update(updates, state.base, params, **extra_args)
        free = add_step(params, moved)
        free_norms = norms_of(free)
        start = jnp.where(before > 0, state.start.per_channel, norms)

        release = jnp.zeros(before.shape, bool)
        if rate is not None:
            gradient = norms_of(updates)
            escape = (free_norms - norms) * steps > rate * start
            total = sum_over(jnp.where(alive, gradient, 0), groups.owner)
            mean = total / jnp.maximum(sum_over(alive, groups.owner), 1)
            strong = gradient > length * mean
            release = (before > 0) & escape & strong
            if release_end_step is not None:
                release &= count <= release_end_step

        hosts = extra_args | {"gradients": updates, "released": release}
        moved, host_state = second.update(moved, state.host, params, **hosts)
        pruned = add_step(params, moved)
        marked = alive & ~channels_alive(groups, pruned)
        decaying = (marked | (before > 0)) & alive & ~release
        done = jnp.where(decaying, before + 1, 0)

        goal = start * (steps - done) / steps
        safe = jnp.where(free_norms > 0, free_norms, 1)
        imposed = jnp.where(done < steps, goal.astype(norms.dtype) / safe, 0)
        # The others follow the host to the last bit; where dimensions share entries,
        # its zeros win.
        ours = decaying | release
        zeros = ~ours & ~channels_alive(groups, pruned)
        factor = jnp.where(decaying, imposed, jnp.where(zeros, 0, 1))
        point = scale_channels(groups, free, factor)
        sums = entry_sums(
            groups, jnp.where(ours, 1, 0), lambda _, m: m.role == "producer"
        )
        theirs = leaf_table(moved)
        chosen = {
            path: jnp.where(sharded_like(sums[path] > 0, step), step, theirs[path])
            for path, step in leaf_table(step_to(point, params)).items()
            if path in sums
        }
        new_state = DecayPruningState(
            base_state,
            host_state,
            count,
            PerChannel(jnp.where(done < steps, done, 0)),
            PerChannel(start.astype(state.start.per_channel.dtype)),
            state.releases + jnp.sum(release, dtype=jnp.int32),
        )
        return replace_leaves(moved, chosen), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
