"""The optimizer of a run: every method as one Optax transformation, on one footing.

All methods share the learning rate, its schedule, momentum, weight decay and the
number of steps. Pruning begins and ends at the same shares of the steps, and all that
know a target take the same one. What is removed by a score in one shot goes halfway
between the two; the steps behind it are its fine-tuning, inside the same budget.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdp_jax
from sdp_jax import methods, segments
from sdp_jax.groups import Ranking

if TYPE_CHECKING:
    from experiments.config import Config

Method = Literal[
    "sgd",
    "altsdp",
    "prox_sgd",
    "grda",
    "l1",
    "l2",
    "l2_last",
    "taylor",
    "gradual",
    "random",
    "scratch",
    "discriminant",
    "depgraph",
    "depgraph_steps",
    "depgraph_reg",
    "depgraph_growing",
    "slimming",
    "perspective",
    "gate_decorator",
    "hspg",
    "dhspg",
    "hesso",
    "spp",
    "increg",
]
METHODS: tuple[Method, ...] = get_args(Method)
# Their channels go by scores that are computed outside of the step.
FROM_OUTSIDE = {"discriminant"}
# Their state remembers which channels the threshold set to zero.
THRESHOLD = {"altsdp", "prox_sgd"}
# They work on the scales of a normalisation alone.
NEED_SCALES = {"slimming"}
# Their equations are those of SGD.
NEED_SGD = {"prox_sgd", "grda", "increg"}
# The hosts of the Decay Pruning Method.
HOSTS = {"depgraph_steps", "dhspg", "gate_decorator"}


class Plan(NamedTuple):
    """When a run of so many steps prunes, and how much.

    Attributes:
      config: the run.
      steps: number of its updates.
      begin: number of updates after which pruning begins.
      end: number of updates after which it is done.
    """

    config: "Config"
    steps: int
    begin: int
    end: int

    @property
    def middle(self) -> int:
        """When everything goes that goes in one shot."""
        return one_shot_step(self.config, self.steps)

    @property
    def rate(self) -> Any:
        """The learning rate, a number or a schedule."""
        return learning_rate(self.config, self.steps)

    @property
    def base(self) -> optax.GradientTransformation:
        """The optimizer that all methods share."""
        config = self.config
        if config.base == "sgd":
            return optax.sgd(self.rate, config.momentum or None)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                self.rate,
                b2=0.99,
                weight_decay=config.weight_decay,
                mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
            ),
        )

    def target(
        self, begin: int, end: int, ranking: Ranking = "global"
    ) -> sdp_jax.Strength:
        """The target, reached between two steps."""
        config = self.config
        if config.sparsity is None:
            raise ValueError(
                f"method {config.method} needs --sparsity, the share of "
                f"{config.target} that goes"
            )
        return sdp_jax.target_sparsity(
            config.sparsity,
            begin,
            max(end, begin + 1),
            target=config.target,
            ranking=ranking,
        )

    def one_shot(self, step: int, ranking: Ranking = "global") -> sdp_jax.Strength:
        """All of the target after ``step`` updates."""
        return self.target(step - 1, step, ranking)

    def layer_sparsity(self, groups: sdp_jax.Groups) -> dict[str, float]:
        """What every dimension loses where all lose the same share of channels."""
        groups = groups.dense
        strength, floors = self.one_shot(1, "dimension"), [1] * len(groups)
        spread = jnp.concatenate([jnp.arange(1.0, d.size + 1) for d in groups])
        thresholds, _ = strength.update(
            strength.init(groups, floors), spread, groups, floors
        )
        parts = groups.split(thresholds)
        return {name: float(jnp.isinf(t).mean()) for name, t in parts.items()}


def has_scales(groups: sdp_jax.Groups) -> bool:
    """Whether a dimension has the scale of a normalisation."""
    paths = [m.path for d in groups for m in d.producers]
    return any(path.endswith("/scale") for path in paths)


def learning_rate(config: "Config", steps: int) -> Any:
    """The learning rate of a run of ``steps`` updates, a number or a schedule."""
    rate, rest = config.learning_rate, steps - warmup_steps(config, steps)
    schedules: dict[str, Any] = {
        "constant": lambda: rate,
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
        "step": lambda: optax.piecewise_constant_schedule(
            rate, {rest // 2: 0.1, rest * 3 // 4: 0.1}
        ),
    }
    schedule: Any = schedules[config.schedule]()
    if rest == steps:
        return schedule
    if not callable(schedule):
        schedule = optax.constant_schedule(rate)
    parts: list[Any] = [optax.linear_schedule(0.0, rate, steps - rest), schedule]
    return optax.join_schedules(parts, [steps - rest])


def warmup_steps(config: "Config", steps: int) -> int:
    """The number of steps in which the learning rate rises.

    Raises:
      ValueError: if the run has no other steps.
    """
    if 0 <= config.warmup < config.epochs:
        count = round(config.warmup * steps / config.epochs)
        if count < steps:
            return count
    raise ValueError(
        f"warmup must be at least 0 and less than the {config.epochs} epochs, so that "
        f"at least one of the {steps} steps follows it; got {config.warmup}"
    )


def pruning_steps(config: "Config", steps: int) -> tuple[int, int]:
    """The numbers of updates after which pruning begins, and is done."""
    return round(config.begin * steps), round(config.end * steps)


def one_shot_step(config: "Config", steps: int) -> int:
    """The update at which everything goes that goes in one shot."""
    begin, end = pruning_steps(config, steps)
    return max(1, (begin + end) // 2)


def make_optimizer(
    config: "Config", groups: sdp_jax.Groups, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run.

    Args:
      config: the run.
      groups: the channel dimensions of the parameters.
      steps: number of updates.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: if the method needs a target and has none, is for SGD alone and the
        base another one, or a value is out of range.
    """
    if config.base != "sgd" and (config.momentum or config.method in NEED_SGD):
        raise ValueError(
            f"momentum and the methods {sorted(NEED_SGD)} are for base='sgd'; got "
            f"base={config.base!r} with momentum {config.momentum} and method "
            f"{config.method!r}"
        )
    plan = Plan(config, steps, *pruning_steps(config, steps))
    tx = BUILDERS[config.method](plan, groups)
    if config.decay_steps > 1 and config.method not in HOSTS:
        raise ValueError(
            f"decay_steps is for the methods {sorted(HOSTS)}; got {config.method!r}"
        )
    if config.weight_decay and config.base == "sgd":
        tx = optax.chain(optax.add_decayed_weights(config.weight_decay), tx)
    return optax.with_extra_args_support(tx)


def _altsdp(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    momentum = config.momentum or None
    if config.sparsity is None:
        strength = sdp_jax.valley_strength(
            config.c, config.mu, plan.rate, momentum=momentum
        )
    else:
        strength = plan.target(plan.begin, plan.end)
    if config.stop_rise is not None:
        strength = methods.until_compressed(strength, rise=config.stop_rise)
    common: Any = {"weights": config.weights, "min_channels": config.min_channels}
    if config.valley == "none":
        return sdp_jax.altsdp(plan.base, groups, strength=strength, **common)
    estimate: Any = {"estimator": None}
    if config.valley != "hessian":
        estimate = {
            "estimator": config.valley,
            "decay": config.valley_decay,
            "every": config.valley_every,
        }
    return optax.chain(
        plan.base,
        sdp_jax.dual_averaging(),
        sdp_jax.valley.project_onto_valley(
            groups, strength, rank=config.valley_rank, **estimate, **common
        ),
        sdp_jax.group_soft_threshold(groups, strength, **common),
    )


def _prox_sgd(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    tx = sdp_jax.prox_sgd(
        plan.rate,
        groups,
        strength=config.penalty,
        weights=config.weights,
        min_channels=config.min_channels,
        momentum=config.momentum or None,
    )
    if config.sparsity is None:
        return tx
    return optax.chain(tx, _remove(plan, groups, methods.l2_norm()))


def _grda(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    return sdp_jax.grda(plan.rate, c=plan.config.c, mu=plan.config.mu)


def _remove(
    plan: Plan,
    groups: sdp_jax.Groups,
    score: methods.Score | None,
    *,
    at: int | None = None,
    ranking: Ranking = "global",
    **options: Any,
) -> optax.GradientTransformation:
    """Removal in one shot."""
    strength = plan.one_shot(plan.middle if at is None else at, ranking)
    least = plan.config.min_channels
    return methods.remove_lowest(groups, strength, score, min_channels=least, **options)


def _by_score(
    make: Callable[[Plan], methods.Score | None],
    ranking: Ranking = "global",
    in_front: Callable[[Plan, sdp_jax.Groups], Any] | None = None,
) -> "Builder":
    """SGD, perhaps with a regulariser in front of it, and removal in one shot."""

    def build(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
        base = plan.base
        if in_front is not None:
            base = optax.chain(in_front(plan, groups), base)
        host = _remove(plan, groups, make(plan), ranking=ranking)
        return methods.hosted(base, host)

    return build


def _events(plan: Plan, count: int = 20) -> int:
    """Steps from one pruning event to the next, if there are so many of them."""
    return max(1, (plan.end - plan.begin) // count)


def _l2_last(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    host = _remove(plan, groups, methods.l2_norm(), at=plan.steps)
    return methods.hosted(plan.base, host)


def _gradual(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    """Magnitude pruning along a ramp, within layers."""
    host = methods.remove_lowest(
        groups,
        plan.target(plan.begin, plan.end, "dimension"),
        methods.l2_norm(),
        every=_events(plan, 100),
        min_channels=plan.config.min_channels,
    )
    return methods.hosted(plan.base, host)


def _scratch(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    """Random channels, of given number, from the first update on.

    They are initialised in the dense network: where its initialiser scales by fan-in,
    with smaller weights than in a network made with these widths.
    """
    left, sizes = plan.config.widths_left, groups.sizes
    fits = len(left) == len(sizes)
    if not fits or any(
        not 0 < n <= size for n, size in zip(left, sizes.values(), strict=True)
    ):
        raise ValueError(
            f"method scratch needs widths_left, channels for each of {sizes}; got "
            f"{left}"
        )
    gone = np.repeat(np.asarray(list(sizes.values())) - left, list(sizes.values()))

    def thresholds(state: Any, scores: jax.Array, *_: Any) -> tuple[jax.Array, Any]:
        place = segments.ranks(scores, groups.owner)
        return jnp.where(place < gone, jnp.inf, 0.0), state

    score = methods.random_score(jax.random.key(plan.config.seed))
    strength = sdp_jax.Strength(lambda groups, floors: (), thresholds)
    return methods.hosted(plan.base, methods.remove_lowest(groups, strength, score))


def _taylor(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # The mean over the last twentieth of the steps before the cut.
    window = max(1, plan.middle // 10)
    host = _remove(
        plan,
        groups,
        methods.taylor(),
        at=max(1, plan.middle // window) * window,
        every=window,
        accumulate=True,
    )
    return methods.hosted(plan.base, host)


def _hspg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    host = methods.hspg(
        groups,
        learning_rate=plan.rate,
        penalty=plan.config.penalty,
        begin_step=plan.middle,
        min_channels=plan.config.min_channels,
    )
    return methods.hosted(plan.base, host)


def _dhspg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # A norm of 2 vanishes between begin and end, however short the budget.
    penalty = 2 / (plan.config.learning_rate * max(plan.end - plan.begin, 1))
    host = methods.dhspg(
        groups,
        plan.one_shot(max(plan.begin, 1)),
        learning_rate=plan.rate,
        penalty=max(penalty, plan.config.penalty),
        begin_step=plan.begin,
        min_channels=plan.config.min_channels,
    )
    return _decayed(plan, plan.base, host, groups)


def _hesso(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    host = methods.hesso(
        groups,
        plan.one_shot(plan.begin + 1),
        begin_step=plan.begin,
        end_step=plan.begin + max(plan.end - plan.begin, 10),
        min_channels=plan.config.min_channels,
    )
    return methods.hosted(plan.base, host)


def _gate(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # Ten rounds of one tick and one tock, in the paper's proportion of epochs 1 : 10
    # as nearly as the budget permits.
    tick = max(1, (plan.end - plan.begin) // 40)
    host = methods.gate_decorator(
        groups,
        # Complete at the last tick, where the last channels go.
        plan.target(plan.begin, plan.end // (4 * tick) * (4 * tick)),
        tick_steps=tick,
        tock_steps=3 * tick,
        ticks=1,
        end_step=plan.end,
        min_channels=plan.config.min_channels,
    )
    base, penalty = plan.base, plan.config.penalty
    if has_scales(groups):

        def in_time(count: Any) -> Any:
            return jnp.where(count < plan.end, penalty, 0.0)

        base = optax.chain(methods.scale_penalty(groups, in_time), base)
    return _decayed(plan, base, host, groups)


def _depgraph_steps(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    """DepGraph's progressive pruning: a few channels at a time."""
    host = methods.remove_lowest(
        groups,
        plan.target(plan.begin, plan.end),
        methods.group_importance(),
        every=_events(plan),
        min_channels=plan.config.min_channels,
    )
    return _decayed(plan, plan.base, host, groups)


def _decayed(
    plan: Plan,
    base: optax.GradientTransformation,
    host: optax.GradientTransformation,
    groups: sdp_jax.Groups,
) -> optax.GradientTransformation:
    """The host under the Decay Pruning Method, if the run asks for it."""
    config = plan.config
    if config.decay_steps == 1:
        return methods.hosted(base, host)
    return methods.decay_pruning(
        base,
        host,
        groups,
        steps=config.decay_steps,
        rate=config.release_rate,
        length=config.release_length,
        release_end_step=plan.end,
    )


def _spp(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    return methods.spp(
        plan.base,
        groups,
        plan.layer_sparsity(groups),
        jax.random.key(plan.config.seed),
        every=_events(plan, 100),
        begin_step=plan.begin,
        min_channels=plan.config.min_channels,
    )


def _increg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config, updates = plan.config, 100
    rate = config.learning_rate / (1 - config.momentum)
    # The weakest channel loses 14 e-foldings until the end, however short the budget;
    # what has not vanished by then is removed.
    amplitude = 2 * 14 / (rate * max(plan.end - plan.begin, 1) * updates)
    tx = methods.increg(
        plan.base,
        groups,
        plan.layer_sparsity(groups),
        every=_events(plan, updates),
        amplitude=amplitude,
        begin_step=plan.begin,
        min_channels=config.min_channels,
    )
    return optax.chain(tx, _remove(plan, groups, methods.l2_norm(), at=plan.end))


def _fixed(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    return methods.group_norm_regularizer(groups, plan.config.penalty)


def _growing(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # The coefficient grows by the penalty ten times before the cut.
    penalty, every = plan.config.penalty, max(1, plan.middle // 10)
    return methods.group_norm_regularizer(groups, penalty, growing=penalty, every=every)


Builder = Callable[[Plan, sdp_jax.Groups], optax.GradientTransformation]
BUILDERS: Mapping[Method, Builder] = {
    "sgd": lambda plan, groups: plan.base,
    "altsdp": _altsdp,
    "prox_sgd": _prox_sgd,
    "grda": _grda,
    "l1": _by_score(lambda plan: methods.l1_norm(), "dimension"),
    "l2": _by_score(lambda plan: methods.l2_norm(), "dimension"),
    "l2_last": _l2_last,
    "gradual": _gradual,
    "scratch": _scratch,
    "taylor": _taylor,
    "random": _by_score(
        lambda plan: methods.random_score(jax.random.key(plan.config.seed)),
        "dimension",
    ),
    "discriminant": _by_score(lambda plan: None, "dimension"),
    "depgraph": _by_score(lambda plan: methods.group_importance()),
    "depgraph_steps": _depgraph_steps,
    "depgraph_reg": _by_score(lambda plan: methods.group_importance(), in_front=_fixed),
    "depgraph_growing": _by_score(
        lambda plan: methods.group_importance(), in_front=_growing
    ),
    "slimming": _by_score(
        # Layers without a scale go by their entries, each layer by itself.
        lambda plan: methods.scale_score(missing="rms"),
        "dimension",
        lambda plan, groups: methods.scale_penalty(groups, plan.config.penalty),
    ),
    "perspective": _by_score(
        lambda plan: methods.l2_norm(),
        in_front=lambda plan, groups: methods.perspective_regularizer(
            groups, plan.config.penalty, alpha=0.5, bound=1.0
        ),
    ),
    "gate_decorator": _gate,
    "hspg": _hspg,
    "dhspg": _dhspg,
    "hesso": _hesso,
    "spp": _spp,
    "increg": _increg,
}
