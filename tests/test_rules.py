"""One record per primitive, and all that is asked of a primitive is asked of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

import sdp_jax
from sdp_jax.tracing import (
    rules_contract,
    rules_control,
    rules_elementwise,
    rules_index,
    rules_linalg,
    rules_mesh,
    rules_shape,
)
from sdp_jax.tracing.rule import Rule
from sdp_jax.tracing.rules import RULES
from tests import promise

FAMILIES = (rules_elementwise, rules_shape, rules_index, rules_contract)
FAMILIES += (rules_control, rules_linalg, rules_mesh)


def make(name, result, impl):
    primitive = Primitive(name)
    primitive.def_impl(impl)
    primitive.def_abstract_eval(result)
    return primitive


def checked(x, *, length):
    """Doubles what is as long as it says."""
    if x.shape[-1:] != (length,):
        raise TypeError(f"{x.shape} does not end in {length}")
    return x


def half(x):
    return jax.core.ShapedArray((x.shape[0], x.shape[1] // 2), x.dtype)


DOUBLE = make("test_double", checked, lambda x, length: 2 * checked(x, length=length))
SAME = make("test_same", lambda x: x, lambda x: x)
HALF = make("test_half", half, lambda x: x[:, : x.shape[1] // 2])
X = jnp.ones((3, 5))


def as_they_are(t, eqn, ins):
    return list(ins)


def test_everything_known_of_a_primitive_is_one_rule():
    for family in FAMILIES:
        tables = {k for k, v in vars(family).items() if isinstance(v, dict)}
        assert {k for k in tables if not k.startswith("__")} == {"RULES"}, family
    assert all(isinstance(rule, Rule) for rule in RULES.values())
    for name, rule in RULES.items():
        (found,) = [f.RULES[name] for f in FAMILIES if name in f.RULES]
        assert found is rule
    assert sum(len(f.RULES) for f in FAMILIES) == len(RULES)


def test_a_rule_is_what_analysis_evaluation_and_counts_use(monkeypatch, x64):
    def fn(p, x):
        y = x @ p["a"]
        return DOUBLE.bind(y, length=y.shape[-1]) @ p["b"]

    shapes = {"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3))}
    params = promise.randomise(shapes)
    x = jnp.ones((3, 5))
    plain = sdp_jax.cost(fn, params, x).flops
    groups = sdp_jax.find_groups(fn, params, x)
    assert not groups.sizes
    assert any("no rule" in why for f in groups.frozen for why in f.reasons)

    rule = Rule(
        as_they_are,
        rebuild=lambda n, record, args: n.rebind(
            record, args, length=args[0].shape[-1]
        ),
        flops=lambda eqn, shapes, outs: 7 * math.prod(outs[0]),
    )
    monkeypatch.setitem(RULES, "test_double", rule)
    groups = sdp_jax.find_groups(fn, params, x)
    assert list(groups.sizes.values()) == [8]
    assert sdp_jax.cost(fn, params, x).flops == plain + 6 * 3 * 8
    cut = promise.random_cut(groups, 0.5, 0)
    dense = cut.zero(params)
    small = sdp_jax.narrow(fn, cut)
    promise.close(small(cut.take(dense), x), fn(dense, x), 1e-12)
    counts = sdp_jax.count_flops(groups, fn, params, x).flops
    for width in (8, 4):
        assert counts.at([width]) == 2 * 3 * 5 * width + 7 * 3 * width + 18 * width
    assert sdp_jax.cost(small, cut.take(dense), x).flops == counts.at([4])

    # Without how to rebuild it, the primitive is bound as it was, and refuses.
    monkeypatch.setitem(RULES, "test_double", dataclasses.replace(rule, rebuild=None))
    with pytest.raises(TypeError, match="does not end in 8"):
        small(cut.take(dense), x)


@pytest.mark.parametrize("known", [lambda eqn, x: x, None])
def test_what_is_known_is_evaluated(monkeypatch, known):
    def fn(p, x):
        start = SAME.bind(jnp.int32(2))
        return jax.lax.dynamic_slice_in_dim(x @ p["a"], start, 4, 1) @ p["b"]

    def forget(t, eqn, ins):
        return [dataclasses.replace(v, known=None) for v in ins]

    monkeypatch.setitem(RULES, "test_same", Rule(forget, known=known))
    params = {"a": jnp.ones((5, 8)), "b": jnp.ones((4, 3))}
    groups = sdp_jax.find_groups(fn, params, X)
    assert list(groups.sizes.values()) == ([2, 4, 2] if known else [])


@pytest.mark.parametrize("even", [True, False])
def test_what_is_even_is_repeated_on_absent_positions(monkeypatch, even, x64):
    def fn(p, x):
        y = x @ p["a"]
        return SAME.bind(y - y.mean(-1, keepdims=True)).max(-1)

    monkeypatch.setitem(RULES, "test_same", Rule(as_they_are, even=even))
    params = promise.randomise({"a": jnp.ones((5, 8))})
    groups = sdp_jax.find_groups(fn, params, X)
    assert list(groups.sizes.values()) == ([8] if even else [])
    if even:
        cut = promise.random_cut(groups, 0.5, 0)
        dense = cut.zero(params)
        small = sdp_jax.narrow(fn, cut)
        promise.close(small(cut.take(dense), X), fn(dense, X), 1e-12)


@pytest.mark.parametrize("picks", [True, False])
def test_what_picks_does_not_use_the_rest(monkeypatch, picks):
    def first_half(t, eqn, ins):
        return rules_shape._slice(t, _Slice(eqn), ins)

    monkeypatch.setitem(RULES, "test_half", Rule(first_half, picks=picks))
    params = {"a": jnp.ones((5, 8)), "b": jnp.ones((4, 3))}
    groups = sdp_jax.find_groups(
        lambda p, x: jnp.tanh(x @ HALF.bind(p["a"])) @ p["b"], params, X
    )
    assert list(groups.sizes.values()) == ([4] if picks else [4, 4])


class _Slice:
    """An equation of the first half, as one of a slice."""

    def __init__(self, eqn):
        rows, columns = eqn.invars[0].aval.shape
        self.params = {
            "start_indices": (0, 0),
            "limit_indices": (rows, columns // 2),
            "strides": None,
        }
        self.primitive, self.source_info = eqn.primitive, eqn.source_info
