"""All rules, by primitive."""

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

RULES: dict[str, Rule] = {
    **rules_elementwise.RULES,
    **rules_shape.RULES,
    **rules_index.RULES,
    **rules_contract.RULES,
    **rules_control.RULES,
    **rules_linalg.RULES,
    **rules_mesh.RULES,
}
