"""What modules are called with, taken down by hand: an oracle for activations."""

import numpy as np
from flax import linen as nn


def inputs_of(module, variables, x):
    """The inputs and outputs of each submodule of a linen module, by its path."""
    found = {}

    def take_down(following, args, kwargs, context):
        out = following(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(out, type(x)):
            name = "/".join(context.module.path)
            found[name] = (np.asarray(args[0]), np.asarray(out))
        return out

    with nn.intercept_methods(take_down):
        module.apply(variables, x)
    return found


def statistics(values, axis=-1):
    """Mean, mean magnitude, mean square, variance along an axis, in float64."""
    lines = np.moveaxis(np.asarray(values, np.float64), axis, 0)
    lines = lines.reshape(len(lines), -1)
    return {
        "count": np.full(len(lines), float(lines.shape[1])),
        "mean": lines.mean(1),
        "mean_abs": abs(lines).mean(1),
        "mean_square": (lines**2).mean(1),
        "variance": lines.var(1),
    }


def check(moments, values, axis=-1, rtol=1e-10, where=()):
    """Whether statistics are those of values."""
    for name, want in statistics(values, axis).items():
        got = getattr(moments, name)[where]
        atol = rtol * max(abs(want).max(), 1e-3)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=name)
