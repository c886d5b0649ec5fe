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
import optax

import sdp_jax
from sdp_jax import methods

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
    "random",
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
# The hosts of the Decay Pruning Method.
HOSTS = {"depgraph_steps", "dhspg", "gate_decorator"}


class Counted(NamedTuple):
    """What a target of parameters or FLOPs is counted on.

    Attributes:
      groups: the channel dimensions of all variables.
      fn: the network, ``variables, images -> logits``.
      variables: its variables.
      inputs: its other arguments.
    """

    groups: sdp_jax.Groups
    fn: Callable[..., Any]
    variables: Any
    inputs: tuple[Any, ...]


class Plan(NamedTuple):
    """When a run of so many steps prunes, and how much.

    Attributes:
      config: the run.
      steps: number of its updates.
      begin: number of updates after which pruning begins.
      end: number of updates after which it is done.
      counted: what the target is counted on.
    """

    config: "Config"
    steps: int
    begin: int
    end: int
    counted: Counted | None

    @property
    def middle(self) -> int:
        """When everything goes that goes in one shot."""
        return one_shot_step(self.config, self.steps)

    def target(self, begin: int, end: int, *, per_dimension: bool) -> sdp_jax.Strength:
        """The target, reached between two steps."""
        config = self.config
        if config.sparsity is None:
            raise ValueError(
                f"method {config.method} needs --sparsity, the share of "
                f"{config.target} that goes"
            )
        what: dict[str, Any] = {}
        if config.target != "channels":
            if self.counted is None:
                raise ValueError(
                    f"target={config.target!r} is counted on a network, and none was "
                    "given to make_optimizer"
                )
            what = {"target": config.target, "groups": self.counted.groups}
        if config.target == "flops":
            assert self.counted is not None
            what |= {
                "fn": self.counted.fn,
                "params": self.counted.variables,
                "inputs": self.counted.inputs,
            }
        return sdp_jax.target_sparsity(
            config.sparsity,
            begin,
            max(end, begin + 1),
            per_dimension=per_dimension,
            **what,
        )

    def one_shot(self, step: int, *, per_dimension: bool = False) -> sdp_jax.Strength:
        """All of the target after ``step`` updates."""
        return self.target(step - 1, step, per_dimension=per_dimension)

    def ramp(self, *, per_dimension: bool = False) -> sdp_jax.Strength:
        """The target, step by step."""
        return self.target(self.begin, self.end, per_dimension=per_dimension)

    def layer_shares(self, groups: sdp_jax.Groups) -> dict[str, float]:
        """What every dimension loses where all lose the same share of channels."""
        strength = self.one_shot(1, per_dimension=True)
        floors: Any = {name: 1 for name in groups.sizes}
        spread = {n: jnp.arange(1.0, s + 1) for n, s in groups.sizes.items()}
        thresholds, _ = strength.update(
            strength.init(groups.sizes, floors), spread, floors
        )
        return {name: float(jnp.isinf(t).mean()) for name, t in thresholds.items()}


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


def one_shot_step(config: "Config", steps: int) -> int:
    """The update at which everything goes that goes in one shot."""
    begin, end = round(config.begin * steps), round(config.end * steps)
    return max(1, (begin + end) // 2)


def make_optimizer(
    config: "Config",
    groups: sdp_jax.Groups,
    steps: int,
    counted: Counted | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run.

    Args:
      config: the run.
      groups: the channel dimensions of the parameters.
      steps: number of updates.
      counted: what a target of parameters or FLOPs is counted on.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: if the method needs a target and has none, or a value is out of range.
    """
    begin, end = round(config.begin * steps), round(config.end * steps)
    plan = Plan(config, steps, begin, end, counted)
    tx = BUILDERS[config.method](plan, groups)
    if config.decay_steps > 1 and config.method not in HOSTS:
        raise ValueError(
            f"decay_steps is for the methods {sorted(HOSTS)}; got {config.method!r}"
        )
    if config.weight_decay:
        tx = optax.chain(optax.add_decayed_weights(config.weight_decay), tx)
    return optax.with_extra_args_support(tx)


def _sgd(plan: Plan) -> optax.GradientTransformation:
    rate = learning_rate(plan.config, plan.steps)
    return optax.sgd(rate, plan.config.momentum or None)


def _altsdp(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    strength = sdp_jax.valley_strength(config.c, config.mu)
    if config.sparsity is not None:
        strength = plan.ramp(per_dimension=config.ranking == "per_dimension")
    if config.power != 1:
        strength = sdp_jax.adaptive_strength(strength, config.power)
    if config.stop_rise is not None:
        strength = methods.until_compressed(strength, rise=config.stop_rise)
    valley: Any = None
    if config.valley == "hessian":
        valley = {"rank": config.valley_rank, "estimator": None}
    elif config.valley != "none":
        valley = {
            "rank": config.valley_rank,
            "estimator": config.valley,
            "decay": config.valley_decay,
            "every": config.valley_every,
        }
    return sdp_jax.altsdp(
        learning_rate(config, plan.steps),
        groups,
        strength=strength,
        dual=config.dual,
        valley=valley,
        norm=config.norm,
        floor=config.floor,
        momentum=config.momentum or None,
    )


def _prox_sgd(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    tx = sdp_jax.prox_sgd(
        learning_rate(config, plan.steps),
        groups,
        strength=config.penalty,
        norm=config.norm,
        floor=config.floor,
        momentum=config.momentum or None,
    )
    if config.sparsity is None:
        return tx
    return optax.chain(tx, _remove(plan, groups, methods.l2_norm()))


def _grda(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    return sdp_jax.grda(learning_rate(config, plan.steps), c=config.c, mu=config.mu)


def _remove(
    plan: Plan,
    groups: sdp_jax.Groups,
    score: methods.Score | None,
    *,
    at: int | None = None,
    per_dimension: bool = False,
    **options: Any,
) -> optax.GradientTransformation:
    """Removal in one shot."""
    strength = plan.one_shot(
        plan.middle if at is None else at, per_dimension=per_dimension
    )
    floor = plan.config.floor
    return methods.remove_lowest(groups, strength, score, floor=floor, **options)


def _by_score(
    make: Callable[[Plan], methods.Score | None],
    in_front: Callable[[Plan, sdp_jax.Groups], Any] | None = None,
    **options: Any,
) -> Callable[[Plan, sdp_jax.Groups], optax.GradientTransformation]:
    """SGD, perhaps with a regulariser in front of it, and removal in one shot."""

    def build(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
        base = _sgd(plan)
        if in_front is not None:
            base = optax.chain(in_front(plan, groups), base)
        return methods.hosted(base, _remove(plan, groups, make(plan), **options))

    return build


def _events(plan: Plan, count: int = 20) -> int:
    """Steps from one pruning event to the next, if there are so many of them."""
    return max(1, (plan.end - plan.begin) // count)


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
    return methods.hosted(_sgd(plan), host)


def _hspg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    return methods.hspg(
        learning_rate(config, plan.steps),
        groups,
        penalty=config.penalty,
        begin=plan.middle,
        momentum=config.momentum or None,
        floor=config.floor,
    )


def _dhspg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # A norm of 2 vanishes between begin and end, however short the budget.
    penalty = 2 / (plan.config.learning_rate * max(plan.end - plan.begin, 1))
    host = methods.dhspg_host(
        groups,
        plan.one_shot(max(plan.begin, 1)),
        learning_rate=learning_rate(plan.config, plan.steps),
        penalty=max(penalty, plan.config.penalty),
        begin=plan.begin,
        floor=plan.config.floor,
    )
    return _decayed(plan, _sgd(plan), host, groups)


def _hesso(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config = plan.config
    steps = max(plan.end - plan.begin, 10)
    return methods.hesso(
        learning_rate(config, plan.steps),
        groups,
        plan.one_shot(plan.begin + 1),
        begin=plan.begin,
        steps=steps,
        momentum=config.momentum or None,
        floor=config.floor,
    )


def _gate(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    # Ten rounds of one tick and one tock, in the paper's proportion of epochs 1 : 10
    # as nearly as the budget permits.
    tick = max(1, (plan.end - plan.begin) // 40)
    host = methods.tick_tock(
        groups,
        # Complete at the last tick, where the last channels go.
        plan.target(
            plan.begin, plan.end // (4 * tick) * (4 * tick), per_dimension=False
        ),
        tick_steps=tick,
        tock_steps=3 * tick,
        ticks=1,
        until=plan.end,
        floor=plan.config.floor,
    )
    base, penalty = _sgd(plan), plan.config.penalty
    if has_scales(groups):

        def in_time(count: Any) -> Any:
            return jnp.where(count < plan.end, penalty, 0.0)

        rule = methods.scale_penalty(groups, in_time)
        base = optax.chain(rule, base)
    return _decayed(plan, base, host, groups)


def _depgraph_steps(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    """DepGraph's progressive pruning: a few channels at a time."""
    host = methods.remove_lowest(
        groups,
        plan.ramp(),
        methods.group_importance(),
        every=_events(plan),
        floor=plan.config.floor,
    )
    return _decayed(plan, _sgd(plan), host, groups)


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
        release_until=plan.end,
    )


def _spp(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    return methods.spp(
        learning_rate(plan.config, plan.steps),
        groups,
        plan.layer_shares(groups),
        jax.random.key(plan.config.seed),
        every=_events(plan, 100),
        begin=plan.begin,
        momentum=plan.config.momentum or None,
        floor=plan.config.floor,
    )


def _increg(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
    config, updates = plan.config, 100
    rate = config.learning_rate / (1 - config.momentum)
    # The weakest channel loses 14 e-foldings until the end, however short the budget;
    # what has not vanished by then is removed.
    amplitude = 2 * 14 / (rate * max(plan.end - plan.begin, 1) * updates)
    tx = methods.increg(
        learning_rate(config, plan.steps),
        groups,
        plan.layer_shares(groups),
        every=_events(plan, updates),
        amplitude=amplitude,
        begin=plan.begin,
        momentum=config.momentum or None,
        floor=config.floor,
    )
    return optax.chain(tx, _remove(plan, groups, methods.l2_norm(), at=plan.end))


def _regularizer(growing: bool) -> Callable[[Plan, sdp_jax.Groups], Any]:
    def build(plan: Plan, groups: sdp_jax.Groups) -> optax.GradientTransformation:
        penalty = plan.config.penalty
        if not growing:
            return methods.group_norm_regularizer(groups, penalty)
        # The coefficient grows by the penalty ten times before the cut.
        every = max(1, plan.middle // 10)
        return methods.group_norm_regularizer(
            groups, penalty, growing=penalty, every=every
        )

    return build


Builder = Callable[[Plan, sdp_jax.Groups], optax.GradientTransformation]
BUILDERS: Mapping[Method, Builder] = {
    "sgd": lambda plan, groups: _sgd(plan),
    "altsdp": _altsdp,
    "prox_sgd": _prox_sgd,
    "grda": _grda,
    "l1": _by_score(lambda plan: methods.l1_norm(), per_dimension=True),
    "l2": _by_score(lambda plan: methods.l2_norm(), per_dimension=True),
    "l2_last": lambda plan, groups: methods.hosted(
        _sgd(plan), _remove(plan, groups, methods.l2_norm(), at=plan.steps)
    ),
    "taylor": _taylor,
    "random": _by_score(
        lambda plan: methods.random_score(jax.random.key(plan.config.seed)),
        per_dimension=True,
    ),
    "discriminant": _by_score(lambda plan: None, per_dimension=True),
    "depgraph": _by_score(lambda plan: methods.group_importance()),
    "depgraph_steps": _depgraph_steps,
    "depgraph_reg": _by_score(
        lambda plan: methods.group_importance(), _regularizer(False)
    ),
    "depgraph_growing": _by_score(
        lambda plan: methods.group_importance(), _regularizer(True)
    ),
    "slimming": _by_score(
        # Layers without a scale go by their entries, each layer by itself.
        lambda plan: methods.scale_score(missing="rms"),
        lambda plan, groups: methods.scale_penalty(groups, plan.config.penalty),
        per_dimension=True,
    ),
    "perspective": _by_score(
        lambda plan: methods.l2_norm(),
        lambda plan, groups: methods.perspective_regularizer(
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
