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

REBUILD: dict[str, Any] = {
    **rules_shape.REBUILD,
    **rules_contract.REBUILD,
    **rules_control.REBUILD,
}
