"""Factorisations and solvers of matrices: batches of them pass."""

from sdp_jax.tracing.rule import Rule

RULES: dict[str, Rule] = {}
