"""All rules, by primitive."""

from typing import Any

from sdp_jax.tracing import (
    rules_contract,
    rules_control,
    rules_elementwise,
    rules_shape,
)

ANALYSE: dict[str, Any] = {
    **rules_elementwise.RULES,
    **rules_shape.RULES,
    **rules_contract.RULES,
    **rules_control.RULES,
}

# Whose results are functions of their operands alone: random numbers, callbacks and
# what depends on the platform are not.
KNOWN = (
    set(rules_elementwise.RULES) | set(rules_shape.RULES) | set(rules_contract.RULES)
) - {"random_bits", "rng_bit_generator", "rng_uniform", "debug_callback", "debug_print"}

# What may leave positions of its operand unused. Calls hand them on.
PICKS = set("slice split gather dynamic_slice pad jit pjit closed_call".split())

# What evaluation can repeat on what absent positions hold.
EVEN = {"broadcast_in_dim", *rules_elementwise.RULES} - {
    "optimization_barrier",
    "bitcast_convert_type",
    "debug_callback",
    "debug_print",
}

REBUILD: dict[str, Any] = {
    **rules_shape.REBUILD,
    **rules_contract.REBUILD,
    **rules_control.REBUILD,
}
