"""Whoever asks why something stays whole is told what, where, in a line a layer."""

import jax
import jax.numpy as jnp

import sdp_jax

X = jnp.ones((5, 4))


def told(fn, sizes, x=X):
    params = {k: jnp.ones(n) for k, n in sizes.items()}
    groups = sdp_jax.find_groups(fn, params, x)
    why = {(f.path, f.axis): "; ".join(f.reasons) for f in groups.frozen}
    return why, str(groups).partition("cannot be cut:\n")[2].splitlines()


def test_a_reshaped_output_is_an_output():
    sizes = {"w": (4, 8), "u": (8, 12)}

    def fn(p, x):
        return (jnp.tanh(x @ p["w"]) @ p["u"]).reshape(5, 3, 4)

    def shuffled(p, x):  # Half of the factors are seen by a permutation in between.
        return fn(p, x).transpose(0, 2, 1).reshape(5, 2, 6)

    for f in (fn, shuffled):
        why, _ = told(f, sizes)
        assert why["u", 1] == "output: is an output of the function"


def test_what_freezes_a_part_of_a_grid_is_told_of_the_grid():
    def fn(p, x):
        y = (x @ p["w"]).reshape(5, 3, 4)
        return jnp.sort(jnp.sort(y, axis=1), axis=2).reshape(5, 12) @ p["v"]

    why, _ = told(fn, {"w": (4, 12), "v": (12, 2)})
    assert "sort: compares all channels" in why["w", 1]


def test_an_unused_leaf_is_not_used():
    def fn(p, x):
        y = jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(5, 6)
        return y @ p["v"]

    why, lines = told(fn, {"w": (4, 2, 3), "v": (6, 5), "unused": (7, 9)})
    unused = "is not used by the function at these input shapes"
    assert why["unused", 0] == why["unused", 1] == unused
    assert f"  unused[0, 1]: {unused}" in lines


def test_what_only_empty_arrays_see_is_not_used():
    def fn(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    why, _ = told(fn, {"w": (4, 8), "v": (8, 3)}, x=jnp.zeros((0, 4)))
    assert set(why.values()) == {"is not used by the function at these input shapes"}


def test_a_line_for_each_layer():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 3, 4)), "bias": jnp.ones(4)},
        "out": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = p["conv"]["kernel"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        x = jax.nn.relu(x + p["conv"]["bias"]).mean((1, 2))
        return x @ p["out"]["kernel"] + p["out"]["bias"]

    text = str(sdp_jax.find_groups(fn, params, jnp.ones((1, 6, 6, 3))))
    conv, out = text.partition("cannot be cut:\n")[2].splitlines()
    assert conv.startswith("  conv/kernel[0, 1, 2]: conv_general_dilated: convolves")
    assert out == "  out/bias[0], kernel[1]: output: is an output of the function"


def test_a_package_is_told_with_the_users_call():
    code = "def sort(x):\n    return jnp.sort(x)\n"
    package = {"jnp": jnp}
    exec(compile(code, "/env/lib/site-packages/models/net.py", "exec"), package)
    layer = {"sort": package["sort"]}
    name = "/env/lib/site-packages/flax/linen/dense.py"
    exec(compile("def call(x):\n    return sort(x)\n", name, "exec"), layer)

    def fn(p, x):
        return layer["call"](x @ p["w"]) @ p["v"]

    why, _ = told(fn, {"w": (4, 8), "v": (8, 2)})
    line = fn.__code__.co_firstlineno + 1
    assert f"(models/net.py:2, called at {__file__}:{line})" in why["w", 1]
